#!/usr/bin/env bash
# Run tests on the oddest machine that this one can pretend to be: tests/odd_machine.sh PYTEST-ARGUMENT...
#
# A copy of the checkout, and a TMPDIR longer than a socket's name may be (108 bytes), both with blanks and umlauts; umask 077;
# a HOME that nobody can write to; LC_ALL=C; one core; and as root neither a network nor IPv6.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scratch=$(mktemp --directory)
trap 'rm -rf "$scratch"' EXIT
umask 077
checkout="$scratch/ein Pfad mit Ümläuten"
temporary="$scratch/ein Ordner für Dateien auf Zeit und mit einem Namen so lang dass kein Socket mehr hineinpaßt"
mkdir "$checkout" "$temporary"
git ls-files -z --cached --others --exclude-standard |
  tar --create --null --files-from=- --ignore-failed-read | tar --extract --directory="$checkout"

core=$(taskset --cpu-list --pid $$ | sed 's/.*: //; s/[,-].*//')
odd=(taskset --cpu-list "$core" python -m pytest -p no:cacheprovider "$@")
alone='ip link set lo up && echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6'
if unshare --net bash -c "$alone" 2>/dev/null; then
  odd=(unshare --net bash -c "$alone && exec \"\$@\"" bash "${odd[@]}")
else
  echo "with the network: to be without it takes root, unshare and ip"
fi

cd "$checkout"
export TMPDIR="$temporary" HOME=/proc LC_ALL=C PYTHONDONTWRITEBYTECODE=1
"${odd[@]}"
