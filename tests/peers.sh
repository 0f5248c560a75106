#!/usr/bin/env bash
# Put QEMUs of several Debian releases side by side, and a Linux kernel for a guest, for the interop tests.
#
# Usage: tests/peers.sh [FOLDER]      default: $MIGFW_PEERS, else $XDG_CACHE_HOME/migfw/peers
#
# apt resolves and downloads the packages of each release with state of its own; dpkg-deb unpacks them. Nothing is installed, mounted or
# run as root: tests/helpers/peers.py starts each program with its own dynamic linker. What is there already is kept.
set -euo pipefail

folder=${1:-${MIGFW_PEERS:-${XDG_CACHE_HOME:-$HOME/.cache}/migfw/peers}}
required=(bullseye bookworm trixie)  # QEMU 5.2, 7.2 and 10.0
newest=(sid forky)                   # the newest QEMU that Debian has: the first of these that can be had
qemu_packages=(qemu-system-x86)
linux_packages=(linux-image-cloud-amd64 busybox-static)

fail() {
    echo "make peers: $*" >&2
    exit 1
}

for program in apt-get dpkg-deb; do
    command -v "$program" >/dev/null || fail "needs $program: the peers are Debian's packages"
done
[[ $(dpkg --print-architecture) == amd64 ]] || fail "needs an amd64 host, this is $(dpkg --print-architecture)"

# The mirror that this machine uses for Debian itself, from apt's own view of its sources.
mirror() {
    apt-get indextargets --format '$(SITE) $(ORIGIN) $(REPO_URI)' 2>/dev/null | awk '$2 == "Debian" { print $NF; exit }'
}

mirror=$(mirror)
[[ -n $mirror ]] || mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/*.sources 2>/dev/null | head -n 1)
[[ -n $mirror ]] || mirror=$(sed -n 's/^deb \(\[[^]]*\] \)\?\([^ ]*\) .*/\2/p' /etc/apt/sources.list 2>/dev/null | head -n 1)
[[ -n $mirror ]] || fail "apt knows no Debian mirror (see /etc/apt/sources.list.d)"

# apt's options for one release: its own sources, lists, cache and an empty list of installed packages.
# Releases that are no longer updated have an expired index, which is no harm here.
apt_for() {
    local state=$1 suite=$2
    shift 2
    mkdir -p "$state"/{lists,archives}/partial
    : >"$state/status"
    echo "deb $mirror $suite main" >"$state/sources.list"
    apt-get -qq -o Dir::Etc::SourceList="$state/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State="$state" -o Dir::State::Lists="$state/lists" -o Dir::State::Status="$state/status" \
        -o Dir::Cache="$state" -o Dir::Cache::Archives="$state/archives" -o Debug::NoLocking=true \
        -o Acquire::Check-Valid-Until=false -o Acquire::Languages=none -o APT::Sandbox::User= \
        -o APT::Install-Recommends=false -o APT::Get::AllowUnauthenticated=false "$@"
}

# unpack NAME SUITE PACKAGE...: FOLDER/NAME holds the packages and all that they depend on, or nothing.
unpack() {
    local name=$1 suite=$2 root=$folder/$1 package
    shift 2
    [[ ! -e $root/.complete ]] || return 0
    rm -rf "$root" "$root.new" "$folder/apt/$name"
    mkdir -p "$root.new"
    local state=$folder/apt/$name
    apt_for "$state" "$suite" update >"$folder/$name.log" 2>&1 &&
        apt_for "$state" "$suite" install --download-only -y "$@" >>"$folder/$name.log" 2>&1 || return 1
    for package in "$state"/archives/*.deb; do
        dpkg-deb -x "$package" "$root.new" >>"$folder/$name.log" 2>&1 || return 1
    done
    rm -rf "$state"
    touch "$root.new/.complete"
    mv "$root.new" "$root"
}

reason() {
    grep -E '^(E|W):' "$folder/$1.log" | tail -n 1 || tail -n 1 "$folder/$1.log"
}

mkdir -p "$folder"
for suite in "${required[@]}"; do
    unpack "$suite" "$suite" "${qemu_packages[@]}" || fail "cannot get QEMU of Debian $suite: $(reason "$suite")"
done
for suite in "${newest[@]}"; do
    if unpack newest "$suite" "${qemu_packages[@]}"; then
        break
    fi
    echo "make peers: cannot get QEMU of Debian $suite: $(reason newest)" >&2
done
[[ -e $folder/newest/.complete ]] || echo "make peers: goes on without the newest QEMU" >&2
# Kernel and busybox of the release that most tests run on; only files, no modules are needed.
unpack linux bookworm "${linux_packages[@]}" || fail "cannot get a Linux kernel: $(reason linux)"
rm -rf "$folder/apt"
echo "$folder"
