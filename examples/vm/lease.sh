#!/bin/busybox sh
# What udhcpc has got.
[ "$1" = bound ] || exit 0
ip address add "$ip/$mask" dev eth0
for each in $router; do ip route add default via "$each"; done
for each in $dns; do echo "nameserver $each"; done > /etc/resolv.conf
echo "address $ip by $router, names by $dns"
