//! `kindling run` gives a guest its image as memory (virtio-pmem, DAX), which neither the guest nor its kernel can change, if
//! the image fits into a window.

use std::fs;
use tests::guest_console::GuestConsole;
use tests::user::User;
use tests::{run, testbed};

/// Prints the magic number of the filesystem on the root device, 0xe0f5e1e2 (fs/erofs/erofs_fs.h).
const MAGIC: &str = "head -c 1028 $DEVICE | tail -c 4 | od -An -tx1";

#[test]
fn an_image_is_in_memory_if_it_fits_into_a_window() {
    let user = User::new();
    let script = |device: &str| format!("ls /dev/pmem* /dev/vd* 2>/dev/null; DEVICE={device}; {MAGIC}");
    for (options, device) in [
        (&[][..], "/dev/pmem0"),
        (&["--cold"], "/dev/pmem0"),
        // The page structures of a window would take too much of the guest's memory.
        (&["--memory", "32"], "/dev/vda"),
        // Only disks can be limited.
        (&["--disk-bps", "10m"], "/dev/vda"),
        (&["--disk-iops", "1000"], "/dev/vda"),
    ] {
        let outcome = run(user.run(options).args(["sh", "-c", &script(device)]));
        assert_eq!(
            outcome.expect_status(0).stdout,
            format!("{device}\n e2 e1 f5 e0\n"),
            "{options:?}: {outcome}"
        );
    }
}

#[test]
fn a_large_image_is_in_a_large_window_or_on_a_disk() {
    let user = User::new();
    let large = user.folder().join("large.erofs");
    fs::copy(testbed("busybox.erofs"), &large).unwrap();
    let file = fs::File::options().write(true).open(&large).unwrap();
    for (mib, device) in [(65, "/dev/pmem0"), (600, "/dev/vda")] {
        // Behind the filesystem.
        file.set_len(mib << 20).unwrap();
        let mut command = user.command("run");
        command.arg(&large).args([
            "sh",
            "-c",
            &format!("DEVICE={device}; {MAGIC}; cat /etc/hostname >/dev/null"),
        ]);
        let outcome = run(&mut command);
        assert_eq!(outcome.expect_status(0).stdout, " e2 e1 f5 e0\n", "{mib} MiB: {outcome}");
    }
}

/// The guest's root writes to the device by every way that it has, and to the files of its root filesystem.
#[test]
fn no_write_of_a_guest_reaches_the_image() {
    let user = User::new();
    let image = user.folder().join("image.erofs");
    fs::copy(testbed("busybox.erofs"), &image).unwrap();
    let before = fs::read(&image).unwrap();
    let script = "for i in 0 1 2 3; do dd if=/dev/urandom of=/dev/pmem0 bs=4k count=16 seek=$((i * 16)) conv=fsync,notrunc; done; \
                  dd if=/dev/zero of=/dev/pmem0 bs=4k count=16 oflag=direct conv=notrunc; \
                  mkdir /m; mount -t erofs -o rw,dax=always /dev/pmem0 /m; echo x >/m/etc/data; \
                  A=$((0x$(sed -n 's/^\\([0-9a-f]*\\)-.* : Persistent Memory/\\1/p; s/^ *\\([0-9a-f]*\\)-.* : namespace0.0/\\1/p' /proc/iomem | head -1))); \
                  [ -c /dev/mem ] && dd if=/dev/zero of=/dev/mem bs=4k count=1 seek=$((A / 4096)); \
                  echo changed >/etc/data; rm /bin/busybox; echo end";
    for is_spare in [false, true] {
        let mut command = user.command("run");
        command.env("KINDLING_SPARE", if is_spare { "1" } else { "0" }).arg(&image);
        let outcome = run(command.args(["sh", "-c", script]));
        assert!(outcome.expect_status(0).stdout.ends_with("end\n"), "{outcome}");
        assert!(fs::read(&image).unwrap() == before, "the image has changed");
        // The next guest sees the image.
        let mut command = user.command("run");
        command.env("KINDLING_SPARE", if is_spare { "1" } else { "0" }).arg(&image);
        let outcome = run(command.args(["sh", "-c", "test -x /bin/busybox; echo $?; cat /etc/data"]));
        let data = outcome.expect_status(0).stdout.clone();
        assert!(data.starts_with("0\n") && !data.contains("changed"), "{outcome}");
    }
}

#[test]
fn a_guest_whose_image_is_truncated_ends_with_its_name() {
    let user = User::new();
    for is_spare in ["0", "1", "1"] {
        let image = user.folder().join("image.erofs");
        fs::copy(testbed("busybox.erofs"), &image).unwrap();
        let mut command = user.command("run");
        command.env("KINDLING_SPARE", is_spare).arg(&image);
        command.args([
            "sh",
            "-c",
            "echo ready; read -r line; ls -lR / >/dev/null; cat /bin/busybox >/dev/null",
        ]);
        let mut guest = GuestConsole::start(&mut command);
        guest.expect("ready");
        fs::File::options().write(true).open(&image).unwrap().set_len(4096).unwrap();
        let report = guest.expect_end("exit status: 125");
        assert!(report.contains("image.erofs is mapped as guest memory and was truncated"), "{report}");
        fs::remove_file(&image).unwrap();
    }
}

/// The pages of an image are in the host's memory once, however many guests use them.
#[test]
fn guests_of_one_image_share_its_pages() {
    let user = User::new();
    let start = |name: &str| {
        let mut guest = GuestConsole::start(user.run(&["--name", name]).args([
            "sh",
            "-c",
            "cat /bin/busybox >/dev/null; echo ready; read -r line",
        ]));
        guest.expect("ready");
        guest
    };
    let guests = [start("one"), start("two")];
    for guest in &guests {
        let mapped = guest.smaps_of("busybox.erofs").concat();
        let kib = |name: &str| -> u64 {
            let lines = mapped.lines().filter_map(|line| line.strip_prefix(name));
            lines.map(|line| line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()).sum()
        };
        let (resident, private) = (kib("Rss:"), kib("Private_Dirty:") + kib("Private_Clean:"));
        assert!(
            resident > 512 && private == 0,
            "{resident} KiB, of which {private} are not shared:\n{mapped}"
        );
    }
    for mut guest in guests {
        guest.send_line();
        guest.expect_status(0);
    }
}
