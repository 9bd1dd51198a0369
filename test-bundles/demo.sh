#!/bin/bash
# The first session, on a real container: start, checkpoint, see it gone, restore, see its counter go on.
# usage: demo.sh FERRY
set -euo pipefail

ferry=$(realpath "$1")
work=$(mktemp -d /tmp/ferry-demo-XXXXXX)
id=ferry-demo-$$

cleanup() {
    "$ferry" delete --force "$id" >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap cleanup EXIT INT TERM

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() { printf '$ %s\n' "${*/#$ferry/ferry}"; "$@"; }
# The container gets the command's input and output, so these must not be ours.
show_detached() {
    printf '$ %s\n' "${*/#$ferry/ferry}"
    "$1" --log "$work/log" "${@:2}" </dev/null >/dev/null 2>&1 || { cat "$work/log" >&2; exit 1; }
}
counter() { cat "$work/bundle/rootfs/counter"; }

say "A bundle: busybox and a counter"
mkdir -p "$work"/bundle/rootfs/{bin,proc,sys,dev,tmp}
cd "$work/bundle"
cp "$(command -v busybox)" rootfs/bin/busybox
for name in sh sleep cat ps; do ln -s busybox "rootfs/bin/$name"; done
"$ferry" spec
loop='i=0; while true; do i=$((i+1)); echo $i > /counter; sleep 0.1; done'
sed -i -e 's/"terminal": true/"terminal": false/' -e 's/"readonly": true/"readonly": false/' \
    -e "s|^\([[:space:]]*\)\"sh\"\$|\1\"sh\", \"-c\", \"$loop\"|" config.json
ls "$work/bundle"

say "Run it"
show_detached "$ferry" run --detach "$id"
until [ -s rootfs/counter ] && [ "$(counter)" -ge 10 ]; do sleep 0.05; done
show "$ferry" list
echo "the counter shows $(counter)"

say "Checkpoint it"
show "$ferry" checkpoint "$id"
stopped=$(counter)
ls -lh checkpoint.tar

say "It is gone"
show "$ferry" list
if "$ferry" state "$id" >/dev/null 2>&1; then
    echo "the container is still there" >&2
    exit 1
fi
sleep 1
echo "the counter stands at $(counter)"
if [ "$(counter)" != "$stopped" ]; then
    echo "the counter went on without its container" >&2
    exit 1
fi

say "Restore it"
show_detached "$ferry" restore --detach "$id"
for _ in $(seq 100); do
    [ "$(counter)" -gt "$stopped" ] && break
    sleep 0.05
done
show "$ferry" list
show "$ferry" exec "$id" ps
now=$(counter)
if [ "$now" -le "$stopped" ]; then
    echo "the counter does not go on" >&2
    exit 1
fi
echo "the counter went on from $stopped and shows $now"
