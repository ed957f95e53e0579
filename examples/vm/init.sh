#!/bin/busybox sh
# The guest: an address, a web server, and an orderly end when the power button is pressed.
/bin/busybox --install -s /bin
export PATH=/bin:/usr/sbin
mount -t sysfs sys /sys
echo "guest up after $(cut -d' ' -f1 /proc/uptime) s"
ip link set lo up
ip link set eth0 up
udhcpc -i eth0 -s /lease -q -n -t 10 -T 1 || echo "no address"
# The job's files, where it has any; on the disk at once, for a crash would leave them empty.
mount -t iso9660 -o ro /dev/vdb /mnt 2>/dev/null && cp -r /mnt/www / && sync
acpid -d -l /dev/null >/dev/null 2>&1 &
httpd -h /www -p 8080
echo "guest serves"
# Programs may be run in here: `outrider exec`.
for port in /sys/class/virtio-ports/*; do
  [ "$(cat "$port/name")" = org.qemu.guest_agent.0 ] && mkdir -p /var/run /run && \
    qemu-ga -m virtio-serial -p "/dev/${port##*/}" -t /run 2>/dev/null &
done
# Somebody may sit at the console: `outrider vm console`.
while true; do setsid cttyhack sh; done
