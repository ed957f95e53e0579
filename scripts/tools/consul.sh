#!/bin/sh
# Prints the path of a real Consul for the tests: the one on PATH, or Debian 11's 1.8.7 unpacked below .tools/.
# Debian 12 carries none. It comes from the machine's own Debian mirror with the suite replaced; the machine's apt
# sources and lists stay as they are. Fails, and says where, if that does not work.
set -eu

VERSION="1.8.7+dfsg1-2+b3"
SHA256="e4e888bba104daba1d9161f49bfc52649a7e4efd45b1a7ead5bc54f2cb9c89d9"  # of the amd64 package
TOOLS="$(cd "$(dirname "$0")/../.." && pwd)/.tools"
HOME_OF_CONSUL="$TOOLS/consul-1.8.7"

if command -v consul; then exit 0; fi

mkdir -p "$TOOLS"
exec 9> "$TOOLS/consul.lock"
flock 9  # two test runs at once fetch it once
if [ ! -x "$HOME_OF_CONSUL/usr/bin/consul" ]; then
  mirror="$(apt-get indextargets --format '$(REPO_URI) $(COMPONENT)' 'Created-By: Packages' |
    grep ' main$' | grep -v -i security | head -n 1 | cut -d ' ' -f 1)"
  [ -n "$mirror" ] || { echo "consul.sh: no Debian source among the machine's apt sources" >&2; exit 1; }
  work="$(mktemp -d "$TOOLS/consul.XXXXXX")"
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bullseye main" > "$work/sources.list"
  apt() {
    apt-get -q -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null \
      -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o Acquire::Languages=none \
      -o Acquire::Check-Valid-Until=false -o APT::Sandbox::User=root "$@" >&2
  }
  apt update
  (cd "$work" && apt download "consul:amd64=$VERSION")
  package="$(echo "$work"/consul_*.deb)"
  echo "$SHA256  $package" | sha256sum --check --quiet >&2
  dpkg-deb --extract "$package" "$work/root"
  rm -rf "$HOME_OF_CONSUL"
  mv "$work/root" "$HOME_OF_CONSUL"
fi
echo "$HOME_OF_CONSUL/usr/bin/consul"
