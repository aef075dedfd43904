#!/bin/sh
export PATH=/bin HOME=/ TERM=linux
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /run /tmp
mount -t devpts pts /dev/pts
mount -t tmpfs run /run
exec </dev/null >/dev/console 2>&1
option() { sed -n "s/.*bed\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
for module in kvm_amd vfio_pci vfio_iommu_type1; do
  modprobe $module || echo "bed: modprobe $module failed"
done
for bdf in $(option bind | tr , ' '); do
  device=/sys/bus/pci/devices/$bdf
  echo vfio-pci >$device/driver_override
  [ ! -e $device/driver ] || echo $bdf >$device/driver/unbind
  echo $bdf >/sys/bus/pci/drivers_probe
  # QEMU's e1000e keeps its registers over the reset by D3hot that Linux would choose, and receives into the last guest's memory.
  [ $(cat $device/device) != 0x10d3 ] || echo bus >$device/reset_method
done
ip link set lo up
[ -z "$(option debian)" ] || . /etc/peers
if [ "$(option mode)" = shell ]; then
  cat /etc/motd
  while :; do setsid cttyhack sh; done
fi
for n in 1 2 3; do stty -F /dev/ttyS$n 115200 raw -echo; done
echo "bed: ready"
while :; do sh /etc/agent </dev/ttyS2 >/dev/ttyS2 2>&1; done
