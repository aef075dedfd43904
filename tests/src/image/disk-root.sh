# Sourced by the guest's init when the root file system is on a disk, bed.root: takes what tests need along, and hands over.
modprobe virtio_blk
modprobe crc32c_generic
modprobe ext4
root=$(option root)
for try in $(seq 200); do [ ! -b "$root" ] || break; usleep 50000; done
mkdir -p /disk
if mount -t ext4 "$root" /disk; then
  mount -t tmpfs -o mode=755 run /run
  # Debian keeps /run as it finds it. /lib and /lib64 are the same there, so nothing but the program is needed.
  mkdir /run/bed
  cp /bin/guest_tool /bin/busybox /run/bed/
  for dir in dev proc sys run; do mount --move /$dir /disk/$dir; done
  exec switch_root /disk /sbin/init
fi
echo "bed: cannot mount $root"
