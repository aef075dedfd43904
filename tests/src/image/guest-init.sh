#!/bin/sh
export PATH=/bin HOME=/ TERM=linux
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /run /tmp
option() { sed -n "s/.*bed\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
case $(option mode) in
  poweroff) poweroff -f ;;
esac
for module in $(option modules | tr , ' '); do
  modprobe $module || echo "bed: modprobe $module failed"
done
[ "$(option mode)" != disk ] || . /etc/disk-root
ip link set lo up
if [ "$(option mode)" = shell ]; then
  while :; do setsid cttyhack sh; done
fi
# From here on the console carries commands and answers; only a panic may cut in.
dmesg -n 1
stty -F /dev/ttyS0 115200 raw -echo
while :; do sh /etc/agent </dev/ttyS0 >/dev/ttyS0 2>&1; done
