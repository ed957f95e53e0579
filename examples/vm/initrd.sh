#!/bin/busybox sh
# The initrd: the drivers, then the disk.
B=/bin/busybox
$B mount -t devtmpfs dev /dev
$B mount -t proc proc /proc
$B --install -s /bin
export PATH=/bin
@modules@
mount -t ext4 -o rw /dev/vda /root || { echo "no root: /dev/vda does not mount"; exit 1; }
mount --move /dev /root/dev
mount --move /proc /root/proc
exec switch_root /root /init
