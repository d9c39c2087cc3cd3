package testsys

// Programs are scripts that run what people run on their files, in an empty directory of a file system: sh -ec
// SCRIPT sh CACHE GOROOT, where CACHE is a directory for go's build cache. Each ends with an error if something is not as on a disk.
var Programs = []struct{ Name, Script string }{
	{"git", `git init -q -b main . && git config user.name t && git config user.email t@localhost
mkdir -p a/b && for i in $(seq 60); do echo "line $i" >a/b/f$i; done; ln -s a/b/f1 link; echo '#!/bin/sh' >run; chmod +x run
git add -A && git commit -qm one && test -z "$(git status --porcelain)"
echo more >>a/b/f1; mv a/b/f2 a/b/renamed; test "$(git status --porcelain | sort | tr '\n' ' ')" = ' D a/b/f2  M a/b/f1 ?? a/b/renamed '
git add -A && git commit -qm two && git checkout -q -b other HEAD~1 && test -e a/b/f2 && git checkout -q main && test ! -e a/b/f2
git gc -q && git fsck --strict && git clone -q . ../git.clone && test "$(cat ../git.clone/link)" = 'line 1
more' && test -x ../git.clone/run && rm -r ../git.clone`},
	{"make", `printf 'all: out\nout: in part\n\tcat in part >out\npart:\n\techo part >part\n' >Makefile; echo in >in
make && make -q && test "$(cat out)" = 'in
part' && touch -d '+1 minute' in && ! make -q && make -j4 && test out -nt part`},
	{"sqlite", `sqlite3 db 'create table t(n integer primary key, x); begin; with recursive c(i) as (select 1 union all select i+1 from c where i < 2000) insert into t select i, hex(randomblob(50)) from c; commit'
test "$(sqlite3 db 'begin; delete from t where n % 2; rollback; update t set x = 1 where n <= 3; pragma integrity_check; select count(*) from t; select sum(x) from t where n <= 3' | tr '\n' ' ')" = 'ok 2000 3 '
for i in 1 2 3; do sqlite3 -cmd '.timeout 60000' db "insert into t(x) values($i)" & done; wait; test "$(sqlite3 db 'select count(*) from t')" = 2003`},
	{"rsync", `mkdir from && for i in $(seq 40); do head -c $((i * 997)) /dev/urandom >from/f$i; done; ln -s f1 from/l; ln from/f2 from/hard
rsync -aH from/ to/ && diff -r from to && test "$(stat -c %i to/f2)" = "$(stat -c %i to/hard)"
echo x >>from/f3; rm from/f4; rsync -aH --delete --inplace from/ to/ && diff -r from to && test -z "$(rsync -aHn --delete --itemize-changes from/ to/)"`},
	{"go", `export HOME=$PWD/.home GOROOT=$2 GOFLAGS='-trimpath -p=1' GOCACHE=$1 GOTOOLCHAIN=local GOTELEMETRY=off GOPROXY=off CGO_ENABLED=0
mkdir lib && printf 'module m\n' >go.mod && printf 'package lib\n\nfunc F() int { return 42 }\n' >lib/lib.go
printf 'package main\n\nimport "m/lib"\n\nfunc main() { println(lib.F()) }\n' >main.go
$GOROOT/bin/go build -o prog . && test "$(./prog 2>&1)" = 42 && $GOROOT/bin/go build -o prog . && test "$(./prog 2>&1)" = 42`},
	{"npm", `export HOME=$PWD/.home npm_config_offline=true npm_config_audit=false npm_config_fund=false npm_config_update_notifier=false
mkdir -p dep/bin app
printf '{"name":"dep","version":"1.0.0","bin":{"dep":"bin/dep.js"}}' >dep/package.json
echo 'exports.answer = 42' >dep/index.js
printf '#!/usr/bin/env node\nconsole.log(require("..").answer)\n' >dep/bin/dep.js
(cd dep; npm pack -s)
cd app
printf '{"name":"app","version":"1.0.0","scripts":{"answer":"dep"}}' >package.json
npm install -s ../dep/dep-1.0.0.tgz
test "$(npm run -s answer)" = 42
test -L node_modules/.bin/dep
npm ci -s
test "$(node -p 'require("dep").answer')" = 42
npm uninstall -s dep
test ! -e node_modules/dep`},
	{"cargo", `export HOME=$PWD/.home CARGO_NET_OFFLINE=true
cargo init -q --vcs none --name prog .
echo 'fn main() { println!("{}", 42) }' >src/main.rs
cargo build -q
test "$(target/debug/prog)" = 42
cargo build -v 2>&1 | grep -q Fresh
echo 'fn main() { println!("{}", 43) }' >src/main.rs
touch -d '+1 minute' src/main.rs
cargo build -q
test "$(target/debug/prog)" = 43
cargo clean
test ! -e target`},
	{"apt", `mkdir -p repo/pkg/DEBIAN repo/pkg/usr/share/of-a-share lists/partial cache/archives/partial root/var/lib/dpkg/info root/var/lib/dpkg/updates root/var/lib/dpkg/triggers
printf 'Package: of-a-share\nVersion: 1\nArchitecture: all\nMaintainer: t <t@localhost>\nDescription: a test\n' >repo/pkg/DEBIAN/control
echo installed >repo/pkg/usr/share/of-a-share/f; dpkg-deb --root-owner-group -b repo/pkg repo/p.deb >/dev/null
{ cat repo/pkg/DEBIAN/control; echo "Filename: ./p.deb"; echo "Size: $(stat -c %s repo/p.deb)"; echo "SHA256: $(sha256sum <repo/p.deb | cut -d' ' -f1)"; } >repo/Packages
: >root/var/lib/dpkg/status; echo "deb [trusted=yes] file:$PWD/repo ./" >sources
apt() { apt-get -q -o Dir::Etc::SourceList="$PWD/sources" -o Dir::Etc::SourceParts=/nonexistent -o Dir::State::Lists="$PWD/lists" -o Dir::State::status="$PWD/root/var/lib/dpkg/status" -o Dir::Cache="$PWD/cache" -o APT::Sandbox::User=root -o DPkg::Options::="--root=$PWD/root" -o DPkg::Options::=--force-script-chrootless "$@"; }
apt update && apt install -y of-a-share && test "$(cat root/usr/share/of-a-share/f)" = installed && apt remove -y of-a-share && test ! -e root/usr/share/of-a-share/f`},
}
