# Unpacks a memcached that lets its clients choose the number of a change, for the tests that need one.
#
# usage: sh newer-memcached.sh PLACE
#
# Does nothing if the machine's own is new enough, or if PLACE/memcached is there already. Otherwise it comes, with the libraries
# that it needs, from a newer suite of Debian, by the mirror that this machine has its packages from. Nothing is installed, and
# nothing outside of PLACE changes; root is not needed.
set -eu

place=$1
oldest=1.6.27
suite=trixie

is_new_enough() {
    version=$("$1" -V 2>/dev/null | sed -n 's/^memcached //p')
    [ -n "$version" ] && [ "$(printf '%s\n' "$oldest" "$version" | sort -V | head -n 1)" = "$oldest" ]
}

for program in memcached "$place/memcached"; do
    if is_new_enough "$program"; then
        echo "$program is memcached $version"
        exit
    fi
done
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "this is not Debian: install memcached $oldest or newer by hand" >&2
    exit 1
fi

# Beside its place, so that it is there as a whole or not at all.
half=$place.half
rm -rf "$half"
mkdir -p "$half/apt/lists/partial" "$half/apt/archives/partial" "$half/files"
half=$(cd "$half" && pwd)
trap 'rm -rf "$half"' EXIT
trap 'exit 1' HUP INT TERM

# A package that every Debian has, and from the archive itself.
mirror=$(apt-get download --print-uris base-files | sed -n "s,^'\(.*\)/pool/.*,\1,p")
if [ -z "$mirror" ]; then
    echo "this machine's package lists are empty; try apt-get update" >&2
    exit 1
fi
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ ! -f $keyring ] || signed="[signed-by=$keyring]"
echo "deb ${signed-} $mirror $suite main" >"$half/apt/sources.list"
: >"$half/apt/status"

# With lists, a cache and a status of its own: that of the machine knows nothing of this.
of_suite() {
    tool=$1
    shift
    "$tool" -qq -o "Dir::Etc::SourceList=$half/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o "Dir::State=$half/apt" -o "Dir::State::Lists=$half/apt/lists" -o "Dir::State::status=$half/apt/status" \
        -o "Dir::Cache=$half/apt" -o Acquire::Languages=none -o APT::Sandbox::User=root \
        -o APT::Update::Error-Mode=any "$@"
}

of_suite apt-get update
# The libraries down to the C library, which is newer than that of the machine, and nothing of what an installation would need.
packages=memcached
known=
while [ "$packages" != "$known" ]; do
    known=$packages
    # shellcheck disable=SC2086
    packages=$({
        printf '%s\n' $known
        of_suite apt-cache depends --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances $known |
            sed -n 's/^ *|*\(Pre\)*Depends: \(lib[^ <>]*\|zlib1g\)$/\2/p'
    } | sort -u | tr '\n' ' ')
    packages=${packages% }
done
echo "from suite $suite: $packages"
# shellcheck disable=SC2086
(cd "$half/apt/archives" && of_suite apt-get download $packages)
for archive in "$half"/apt/archives/*.deb; do
    dpkg-deb -x "$archive" "$half/files"
done

# Started by the loader that belongs to its libraries.
loader=$(cd "$half" && find files -type f -name 'ld-linux*.so.*' | head -n 1)
cat >"$half/memcached" <<END
#!/bin/sh
here=\${0%/*}
exec "\$here/$loader" --library-path "\$here/${loader%/*}" "\$here/files/usr/bin/memcached" "\$@"
END
chmod 755 "$half/memcached"
if ! is_new_enough "$half/memcached"; then
    echo "what suite $suite has does not run here, or is older than $oldest" >&2
    exit 1
fi
rm -rf "$half/apt" "$place"
mv "$half" "$place"
echo "$place/memcached is memcached $version"
