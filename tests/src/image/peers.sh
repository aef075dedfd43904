# Sourced by the host's init when the host has the disks with Debian. Debian itself is mounted on /debian, read-only, and its
# programs run in it by `debian PROGRAM ...`, with this host's devices, sockets in /run, files in /tmp, and the images in
# /images, which begin as they were at each boot of the host.
modprobe virtio_blk
modprobe ext4
disk() {
  for try in $(seq 200); do
    for name in /sys/block/vd*; do
      [ "$(cat $name/serial 2>/dev/null)" != $1 ] || { echo /dev/${name##*/}; return; }
    done
    usleep 50000
  done
  echo "bed: no disk $1" >&2
}
for module in loop dm_mod tun bridge vhost_net vhost_vsock fuse; do modprobe $module; done
mkdir -p /debian /images
mount -t ext4 -o ro "$(disk root)" /debian
mount -t ext4 "$(disk images)" /images
for dir in dev proc sys run tmp images; do mount --bind /$dir /debian/$dir; done
# As switch_root does it, but in a mount namespace of the program's own: to a process that was merely put in another root the
# kernel refuses user namespaces, which passt wants. By env, since busybox would run a program of its own of that name.
cat >/bin/debian <<'END'
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/usr/libexec:/bin
exec unshare -m sh -c 'cd /debian && mount --move . / && exec chroot . /usr/bin/env "$@"' debian "$@"
END
chmod +x /bin/debian
for program in dmsetup fio iperf3 passt qemu-img qemu-io qemu-nbd qemu-storage-daemon socat virtiofsd; do
  rm -f /bin/$program
  printf '#!/bin/sh\nexec debian %s "$@"\n' $program >/bin/$program
  chmod +x /bin/$program
done
