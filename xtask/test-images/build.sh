#!/bin/sh
# Builds the container images of tests/tests/images.rs: an OCI layout with an image per program, all on one base layer.
# mmdebstrap runs this as a hook, with the root of the new system and the folder for the layout as arguments.
set -eu
root=$1 place=$2 busybox=$3
layout=$place/layout work=$place/work
mkdir "$work"
umoci init --layout "$layout"

# Creates an image from the changes in a bundle; the remaining arguments configure it.
image() {
    name=$1; shift
    rm -rf "$work/$name/rootfs/var/cache/apt" "$work/$name/rootfs/var/log/"*.log "$work/$name/rootfs/var/log/apt" \
        "$work/$name/rootfs/dev/null"
    umoci repack --image "$layout:$name" "$work/$name"
    umoci config --image "$layout:$name" "$@"
    rm -rf "${work:?}/$name"
}

# Unpacks a bundle of the base image and installs additional Debian packages in it.
bundle() {
    name=$1; shift
    umoci unpack --image "$layout:base" "$work/$name"
    tree=$work/$name/rootfs
    # The packages' scripts need /dev/null; a regular file replaces the device, which only root could create.
    touch "$tree/dev/null"
    chmod 666 "$tree/dev/null"
    sed "s#^Dir .*#Dir \"$tree\";#; s#^Dir::State::Status .*#Dir::State::Status \"$tree/var/lib/dpkg/status\";#" \
        "$MMDEBSTRAP_APT_CONFIG" > "$work/apt.conf"
    mkdir -p "$tree/var/cache/apt/archives/partial"
    APT_CONFIG=$work/apt.conf apt-get --yes --quiet --no-install-recommends \
        -o Dir::Etc="$root/etc/apt" -o Dir::State::Lists="$root/var/lib/apt/lists" \
        -o DPkg::Chroot-Directory="$tree" -o DPkg::Options::=--force-unsafe-io -o DPkg::Use-Pty=false \
        -o Dir::Log="$work" install "$@"
}

umoci new --image "$layout:empty"

umoci unpack --image "$layout:empty" "$work/busybox"
mkdir -p "$work/busybox/rootfs/bin" "$work/busybox/rootfs/etc"
cp "$busybox" "$work/busybox/rootfs/bin/busybox"
for applet in $("$busybox" --list); do
    [ "$applet" = busybox ] || ln -s busybox "$work/busybox/rootfs/bin/$applet"
done
echo root:x:0:0::/root:/bin/sh > "$work/busybox/rootfs/etc/passwd"
image busybox --config.cmd sh

umoci unpack --image "$layout:empty" "$work/base"
tar --create --one-file-system --directory "$root" --exclude=./var/lib/apt/lists --exclude=./var/cache/apt \
    --exclude=./dev --exclude=./proc --exclude=./sys --exclude=./run \
    --exclude=./etc/hostname --exclude=./etc/resolv.conf . | tar --extract --directory "$work/base/rootfs"
mkdir "$work/base/rootfs/dev" "$work/base/rootfs/proc" "$work/base/rootfs/sys" "$work/base/rootfs/run"
image base

bundle python python3 python3-pip-whl
# pip installs a wheel that is built here, without a package index.
cat > "$work/python/rootfs/tmp/wheel.py" <<'END'
import zipfile
info = "greeting-1.0.dist-info/"
with zipfile.ZipFile("/tmp/greeting-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr("greeting.py", "def main():\n    print('hello from a wheel')\n")
    wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")
    wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(info + "entry_points.txt", "[console_scripts]\ngreet = greeting:main\n")
    names = ["greeting.py"] + [info + name for name in ("METADATA", "WHEEL", "entry_points.txt", "RECORD")]
    wheel.writestr(info + "RECORD", "".join(f"{name},,\n" for name in names))
END
chroot "$work/python/rootfs" sh -ec '
    python3 /tmp/wheel.py
    PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$(echo /usr/share/python-wheels/pip-*.whl) \
        python3 -m pip install --no-index --break-system-packages --root-user-action=ignore /tmp/greeting-*.whl
    rm -r /tmp/* /usr/share/python-wheels'
image python --config.cmd python3 --config.env LANG=C.UTF-8

bundle nginx nginx
ln -sf /dev/stdout "$work/nginx/rootfs/var/log/nginx/access.log"
ln -sf /dev/stderr "$work/nginx/rootfs/var/log/nginx/error.log"
echo 'a page of nginx' > "$work/nginx/rootfs/var/www/html/index.html"
image nginx --config.cmd nginx --config.cmd=-g --config.cmd='daemon off;' --config.stopsignal SIGQUIT \
    --config.exposedports 80/tcp

bundle postgres postgresql
tree=$work/postgres/rootfs
cat > "$tree/usr/local/bin/serve" <<'END'
#!/bin/sh
set -e
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    initdb --auth=trust --no-instructions
fi
exec postgres "$@"
END
chmod 755 "$tree/usr/local/bin/serve"
programs=$(cd "$tree" && echo usr/lib/postgresql/*/bin)
chroot "$tree" sh -c 'install -d -o postgres -g postgres -m 700 /var/lib/postgresql/data
    install -d -o postgres -g postgres -m 3777 /run/postgresql'
image postgres --config.entrypoint serve --config.user postgres --config.stopsignal SIGINT \
    --config.env "PATH=/$programs:/usr/local/bin:/usr/bin:/bin" --config.env PGDATA=/var/lib/postgresql/data \
    --config.env LANG=C.UTF-8 --config.volume /var/lib/postgresql/data --config.exposedports 5432/tcp

bundle node nodejs
image node --config.cmd node

bundle podman podman crun netavark iptables bubblewrap
tree=$work/podman/rootfs
mkdir -p "$tree/srv/container/bin"
cp "$busybox" "$tree/srv/container/bin/busybox"
for applet in cat echo hostname httpd id sh wget; do
    ln -s busybox "$tree/srv/container/bin/$applet"
done
# The guest has no systemd.
cat > "$tree/etc/containers/containers.conf" <<'END'
[containers]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
END
image podman --config.cmd sh

rm -r "$work"
umoci gc --layout "$layout"
