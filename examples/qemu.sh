#!/bin/sh
# Serves IMAGE and boots a guest from it: examples/qemu.sh IMAGE [QEMU ARGUMENTS…]
# VIRTIOD says how to call virtiod (default: virtiod), ACCEL which accelerator QEMU uses (default: kvm:tcg).
set -eu
image=$1
shift
dir=$(mktemp -d)
${VIRTIOD:-virtiod} blk --socket-path "$dir/disk.sock" --blk-file "$image" --num-queues 2 >"$dir/virtiod.log" &
virtiod=$!
trap 'kill "$virtiod" 2>/dev/null; wait "$virtiod" || true; rm -rf "$dir"' EXIT INT TERM
while [ ! -S "$dir/disk.sock" ]; do
  kill -0 "$virtiod" 2>/dev/null || { cat "$dir/virtiod.log"; exit 1; }
  sleep 0.05
done
qemu-system-x86_64 -machine "q35,accel=${ACCEL:-kvm:tcg}" -cpu max -smp 2 -m 1G \
  -object memory-backend-memfd,id=mem,size=1G,share=on -numa node,memdev=mem \
  -chardev "socket,id=disk,path=$dir/disk.sock,reconnect=1" \
  -device vhost-user-blk-pci,chardev=disk,num-queues=2,queue-size=256,bootindex=0 \
  "$@"
