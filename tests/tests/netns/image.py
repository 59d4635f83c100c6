"""image.py OUT: a container image with busybox and a web page, as `docker save` writes one. No network, no registry."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile

BUSYBOX = "/bin/busybox"


def digest(data):
    return hashlib.sha256(data).hexdigest()


def root_file_system():
    """The one layer: applets as links to busybox, a page, and the few directories that a runtime mounts on."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        def add(name, kind=tarfile.REGTYPE, data=b"", mode=0o755, target=""):
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.size, info.linkname = kind, mode, len(data), target
            tar.addfile(info, io.BytesIO(data))

        for name in ["bin", "sbin", "usr", "usr/bin", "usr/sbin", "etc", "proc", "sys", "dev", "tmp", "root", "www"]:
            add(name, tarfile.DIRTYPE)
        with open(BUSYBOX, "rb") as file:
            add("bin/busybox", data=file.read())
        applets = subprocess.run([BUSYBOX, "--list-full"], capture_output=True, text=True, check=True).stdout.split()
        for applet in applets:
            if applet != "bin/busybox" and not applet.startswith("linuxrc"):
                add(applet, tarfile.SYMTYPE, target=BUSYBOX)
        add("etc/passwd", data=b"root:x:0:0:root:/root:/bin/sh\n", mode=0o644)
        add("etc/group", data=b"root:x:0:\n", mode=0o644)
        add("www/index.html", data=b"hello\n", mode=0o644)
    return buffer.getvalue()


def main():
    layer = root_file_system()
    config = json.dumps({
        "architecture": "amd64", "os": "linux",
        "config": {"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + digest(layer)]},
    }).encode()
    config_name, layer_name = digest(config) + ".json", digest(layer) + "/layer.tar"
    manifest = json.dumps([{"Config": config_name, "RepoTags": ["localhost/busybox:1"], "Layers": [layer_name]}]).encode()
    with tarfile.open(sys.argv[1], "w") as tar:
        for name, data in [(config_name, config), (layer_name, layer), ("manifest.json", manifest)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


main()
