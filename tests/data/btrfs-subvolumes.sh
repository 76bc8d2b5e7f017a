#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Makes btrfs-subvolumes.xz beside this: subvolumes as SLES has them. mkfs.btrfs alone can't make any, so this needs
# root and Linux with btrfs; the tests need neither.
set -eu
cd "$(dirname "$0")"
folder=$(mktemp -d)
trap 'umount "$folder/top" 2>/dev/null || true; rm -rf "$folder"' EXIT
truncate -s 112M "$folder/image"
mkfs.btrfs -q -m single -L sles -U 5d1f4e35-2d3c-4ad2-9f4e-0f0b2d0c7a11 "$folder/image"
mkdir "$folder/top"
mount -o loop "$folder/image" "$folder/top"
at=$folder/top/@
root=$at/.snapshots/1/snapshot
for path in "$at" "$at/home" "$at/.snapshots"; do
    btrfs -q subvolume create "$path"
done
mkdir "$at/.snapshots/1" "$at/.snapshots/2" "$at/home/user"
echo 'written at home' >"$at/home/user/notes.txt"
btrfs -q subvolume create "$root"
mkdir "$root/etc" "$root/home"
echo '127.0.0.1 before' >"$root/etc/hosts"
# What lies in a snapshot of the system in place of these two is an empty directory, as Linux shows it.
btrfs -q subvolume create "$root/var"
btrfs -q subvolume create "$root/gone"
echo 'a line of a log' >"$root/var/messages"
echo 'the last one' >"$root/zz"
btrfs -q subvolume snapshot -r "$root" "$at/.snapshots/2/snapshot"
btrfs -q subvolume delete -C "$root/gone"
echo '127.0.0.1 now' >"$root/etc/hosts"
btrfs subvolume set-default "$root"
btrfs -q subvolume sync "$folder/top"
(cd "$folder/top" && find . | sort && cat @/.snapshots/2/snapshot/etc/hosts)
umount "$folder/top"
xz -9 <"$folder/image" >btrfs-subvolumes.xz
