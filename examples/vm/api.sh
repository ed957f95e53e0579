#!/bin/busybox sh
# Calls a process workload through the mesh, by its name.
printf 'content-type: text/plain\r\n\r\n'
wget -q -O - http://api.mesh/ || echo "api does not answer"
