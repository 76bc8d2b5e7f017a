#!/usr/bin/env bash
# Everything that `make demo` and `make test` need, on a fresh Debian 12 or 13 with git and make, as root or with sudo.
# Idempotent: what is there already is left alone, so a second run takes about a second.
# usage: setup.sh [tests|soak]    with "tests", also what only the tests need; with "soak", what only the long ones need as well
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build
for_tests=${1:-}

say() { printf 'setup: %s\n' "$*"; }
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        say "needs root (or sudo) for: $*"
        exit 1
    fi
}

PACKAGES=(python3 python3-venv python3-dev python3-libnbd libnbd-bin nbdkit qemu-utils qemu-system-x86 gcc libc6-dev make git openssl curl
    e2fsprogs ntfs-3g xfsprogs btrfs-progs dosfstools mtools fdisk util-linux procps openssh-client shellcheck
    iproute2 iputils-ping)

# A firmware for EFI, and what makes a program for it out of a kernel; readers of images that are not qemu.
if [ "$for_tests" = soak ]; then
    PACKAGES+=(ovmf systemd-boot-efi binutils 7zip libvmdk-utils sleuthkit)
fi

apt_install() {
    # Lists on a fresh image are absent or old: one update, then the install.
    if [ ! -e build/.apt-updated ]; then
        as_root apt-get -q update
        touch build/.apt-updated
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "$@"
}

missing=()
for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed$' || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
    say "installing ${missing[*]}"
    apt_install "${missing[@]}"
fi

# The real VDDK plugin of nbdkit. Debian 13 packages it (contrib); that package's plugin also loads into Debian 12's nbdkit.
# Its package can't be installed there, so the one file goes where nbdkit looks for plugins.
fetch_vddk_plugin() {
    local work mirror
    work=$PWD/build/vddk-plugin
    rm -rf "$work"
    mkdir -p "$work/lists/partial"
    # Only one of the two files need be there.
    mirror=$( (sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb \(\[[^]]*\] \)\?\([^ ]*\) .*/\2/p' \
        /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null || true) | head -n 1)
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ${mirror:-http://deb.debian.org/debian} trixie main contrib" >"$work/trixie.list"
    local options=(-q -o "Dir::Etc::sourcelist=$work/trixie.list" -o Dir::Etc::sourceparts=- -o "Dir::State::Lists=$work/lists"
        -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root)
    mkdir -p "$work/cache/archives/partial"
    apt-get "${options[@]}" update
    (cd "$work" && apt-get "${options[@]}" download nbdkit-plugin-vddk && dpkg -x nbdkit-plugin-vddk_*.deb root)
    as_root install -m 0644 "$(find "$work/root" -name nbdkit-vddk-plugin.so)" "$(nbdkit --dump-config | sed -n 's/^plugindir=//p')/"
    rm -rf "$work"
}
if ! nbdkit vddk --dump-plugin >/dev/null 2>&1; then
    say "installing nbdkit's VDDK plugin"
    if apt-cache show nbdkit-plugin-vddk >/dev/null 2>&1; then
        apt_install nbdkit-plugin-vddk
    else
        fetch_vddk_plugin
    fi
    nbdkit vddk --dump-plugin >/dev/null
fi

# Kernel, boot loader and shell of the guest that demo and tests boot: unpacked, for nothing of it is for this machine.
if [ ! -e build/boot/busybox ]; then
    say "unpacking a kernel for a guest"
    rm -rf build/boot
    mkdir -p build/boot/packages build/boot/modules
    kernel() { apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1; }
    if ! (cd build/boot/packages && apt-get -q download "$(kernel)" syslinux busybox-static); then
        as_root apt-get -q update
        (cd build/boot/packages && apt-get -q download "$(kernel)" syslinux busybox-static)
    fi
    # A kernel that has virtio built in has no such modules, which tar then complains of.
    dpkg --fsys-tarfile build/boot/packages/linux-image-*.deb | tar -xf - -C build/boot/packages --wildcards \
        './boot/vmlinuz-*' '*/kernel/drivers/virtio/*' '*/virtio_console.ko*' || true
    dpkg -x build/boot/packages/syslinux_*.deb build/boot/packages
    dpkg -x build/boot/packages/busybox-static_*.deb build/boot/packages
    /usr/bin/python3 - build/boot/packages build/boot/modules <<'END'
import lzma, pathlib, sys

for path in pathlib.Path(sys.argv[1]).rglob("virtio*.ko*"):
    data = path.read_bytes()
    name = path.name.partition(".")[0] + ".ko"
    (pathlib.Path(sys.argv[2]) / name).write_bytes(lzma.decompress(data) if path.suffix == ".xz" else data)
END
    mv build/boot/packages/boot/vmlinuz-* build/boot/vmlinuz
    mv build/boot/packages/usr/bin/syslinux build/boot/syslinux
    mv "$(find build/boot/packages -name mbr.bin | head -n 1)" build/boot/mbr.bin
    mv "$(find build/boot/packages -type f -path '*bin/busybox' | head -n 1)" build/boot/busybox
    rm -r build/boot/packages
fi

# libguestfs, which reads what dissect can't. Its virtual machine wants a kernel with its modules; where this machine has none,
# as containers have not, one is unpacked for it.
if [ "$for_tests" = soak ]; then
    for package in guestfish squashfs-tools; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed$' || apt_install guestfish squashfs-tools
    done
    if ! compgen -G '/boot/vmlinuz-*' >/dev/null && [ ! -e build/appliance/environment.json ]; then
        say "unpacking a kernel for libguestfs"
        rm -rf build/appliance
        mkdir -p build/appliance/packages
        appliance_kernel() { apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1; }
        if ! (cd build/appliance/packages && apt-get -q download "$(appliance_kernel)"); then
            as_root apt-get -q update
            (cd build/appliance/packages && apt-get -q download "$(appliance_kernel)")
        fi
        dpkg -x build/appliance/packages/linux-image-*.deb build/appliance/packages/root
        # Debian 13 has them in /usr/lib.
        mkdir -p build/appliance/lib
        mv "$(find build/appliance/packages/root -type d -path '*lib/modules')" build/appliance/lib/
        depmod=$(PATH=$PATH:/usr/sbin:/sbin command -v depmod)
        "$depmod" -b build/appliance "$(ls build/appliance/lib/modules)"
        mv build/appliance/packages/root/boot/vmlinuz-* build/appliance/vmlinuz
        rm -r build/appliance/packages
        mkdir build/appliance/cache
        printf '{"SUPERMIN_KERNEL": "%s", "SUPERMIN_MODULES": "%s", "LIBGUESTFS_CACHEDIR": "%s"}\n' \
            "$PWD/build/appliance/vmlinuz" "$(echo "$PWD"/build/appliance/lib/modules/*)" "$PWD/build/appliance/cache" \
            >build/appliance/environment.json
    fi
    # It is a part of libguestfs' machine, empty or not.
    [ -d /lib/modules ] || as_root mkdir /lib/modules
fi

# An SSH server for one test, unpacked rather than installed: installing it would start a public server on this machine.
if [ "$for_tests" ] && [ ! -x build/openssh/usr/sbin/sshd ]; then
    say "unpacking an SSH server for the tests"
    rm -rf build/openssh
    mkdir -p build/openssh
    if ! (cd build/openssh && apt-get -q download openssh-server libwrap0); then
        as_root apt-get -q update
        (cd build/openssh && apt-get -q download openssh-server libwrap0)
    fi
    for package in build/openssh/*.deb; do
        dpkg -x "$package" build/openssh
    done
    rm build/openssh/*.deb
fi

# LVM's tool for tests of configurations and labels, unpacked for the same reason.
if [ "$for_tests" ] && [ ! -x build/lvm2/lvm ]; then
    say "unpacking LVM for the tests"
    rm -rf build/lvm2
    mkdir -p build/lvm2/packages
    lvm_packages=(lvm2 liblvm2cmd2.03 libdevmapper1.02.1 libdevmapper-event1.02.1)
    lvm_packages+=("$(apt-cache depends lvm2 | sed -n 's/.*Depends: \(libaio1[a-z0-9]*\)$/\1/p' | head -n 1)")
    if ! (cd build/lvm2/packages && apt-get -q download "${lvm_packages[@]}"); then
        as_root apt-get -q update
        (cd build/lvm2/packages && apt-get -q download "${lvm_packages[@]}")
    fi
    for package in build/lvm2/packages/*.deb; do
        dpkg -x "$package" build/lvm2/root
    done
    rm -r build/lvm2/packages
    cat >build/lvm2/lvm <<'END'
#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/root
LD_LIBRARY_PATH=$root/lib/x86_64-linux-gnu:$root/usr/lib/x86_64-linux-gnu LVM_SUPPRESS_FD_WARNINGS=1
export LD_LIBRARY_PATH LVM_SUPPRESS_FD_WARNINGS
for lvm in "$root/usr/sbin/lvm" "$root/sbin/lvm"; do
    [ -x "$lvm" ] && exec "$lvm" "$@"
done
END
    chmod +x build/lvm2/lvm
fi

# Other controllers, for a smoke test on each: the oldest ansible-core that is supported, and the newest, which wants a newer
# Python than Debian 12 has and is left out where there is none.
controller() {
    local name=$1 python=$2 requirement=$3
    if [ "$(cat "build/controllers/$name/.wanted" 2>/dev/null)" != "$requirement" ]; then
        say "making a controller with $requirement"
        rm -rf "build/controllers/$name"
        "$python" -m venv "build/controllers/$name"
        "build/controllers/$name/bin/python" -m pip install -q --no-compile --disable-pip-version-check "$requirement" jmespath
        echo "$requirement" >"build/controllers/$name/.wanted"
    fi
}
controllers() {
    local newest_python
    mkdir -p build/controllers
    controller oldest /usr/bin/python3 'ansible-core==2.16.*'
    newest_python=$(tests/tools/pythons.sh | grep -E 'python3\.1[2-9]$' | tail -n 1 || true)
    if [ "$newest_python" ]; then
        controller newest "$newest_python" 'ansible-core>=2.20'
    else
        say "no Python 3.12 or newer: the newest ansible-core is not tried"
    fi
}
# pip keeps one core busy, so they are made beside .venv. What is imported is compiled then, and the rest never.
controllers_pid=
if [ "$for_tests" ]; then
    controllers &
    controllers_pid=$!
fi

# libnbd's binding exists for the distribution's Python only, so the environment is made from that one and sees its packages.
wanted=$(cat requirements.txt requirements-files.txt requirements-dev.txt tests/setup.sh | sha256sum | cut -c -16)
if [ "$(cat .venv/.wanted 2>/dev/null)" != "$wanted" ]; then
    say "making .venv"
    [ -x .venv/bin/python ] || /usr/bin/python3 -m venv --system-site-packages .venv
    .venv/bin/python -m pip install -q --no-compile --disable-pip-version-check -r requirements-dev.txt
    echo "$wanted" >.venv/.wanted
fi
.venv/bin/python -c 'import nbd, pyVmomi, requests, jmespath, blake3'

[ ! "$controllers_pid" ] || wait "$controllers_pid"

# Ansible wants a collection at ansible_collections/NAMESPACE/NAME.
mkdir -p build/tree/ansible_collections/openvadp
ln -sfn ../../../.. build/tree/ansible_collections/openvadp/backup

[ ! -e tests/simulator/vixdisklib/Makefile ] || make -s -C tests/simulator/vixdisklib OUT="$PWD/build/vddk"
say "ready"
