//! Devices against the backends that Debian has, without a guest: `cargo test -p devices -- --ignored peer`. They are started from `PATH`.

use std::process::{Child, Command, Stdio};

use super::*;

/// A program that is killed at the end.
struct Program(Child);

impl Program {
    fn start(name: &str, words: &[String], socket: &std::path::Path) -> Self {
        let child = Command::new(name).args(words).stdin(Stdio::null()).spawn();
        let program = Self(child.unwrap_or_else(|e| panic!("{name}: {e}; install it")));
        until("it listens", || socket.exists());
        program
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A request of a disk: its type, sector and data, which the device writes or reads; the status.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: (u64, u32, bool)) -> u8 {
    let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    let memory = driver.memory.memory();
    memory.write_slice(&header, GuestAddress(0x60000)).unwrap();
    memory.write_obj(0xff_u8, GuestAddress(0x60100)).unwrap();
    let parts = [(0x60000, 16, false), data, (0x60100, 1, true)];
    let used: Vec<_> = parts.into_iter().filter(|(_, length, _)| *length > 0).collect();
    driver.queues[0].add(&used);
    driver.queues[0].ring();
    driver.queues[0].wait_used().unwrap();
    memory.read_obj(GuestAddress(0x60100)).unwrap()
}

#[test]
#[ignore = "needs qemu-storage-daemon"]
fn qemu_storage_daemon_is_a_peer_that_writes_reads_grows_and_dies() {
    let (socket, image, qmp) = (socket(), socket(), socket());
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let words = [
        "--blockdev".to_owned(),
        format!("driver=file,node-name=image,filename={}", image.display()),
        "--export".to_owned(),
        format!(
            "type=vhost-user-blk,id=e,addr.type=unix,addr.path={},node-name=image,writable=on",
            socket.display()
        ),
        "--chardev".to_owned(),
        format!("socket,id=qmp,path={},server=on,wait=off", qmp.display()),
        "--monitor".to_owned(),
        "chardev=qmp".to_owned(),
    ];
    let mut program = Program::start("qemu-storage-daemon", &words, &socket);
    let device = block::new("_disk0", &socket, 1, 16).unwrap();
    let mut driver = Driver::start(&device, shared_memory(), 1);
    let capacity = || {
        let mut bytes = [0; 8];
        device.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(capacity(), 2048);
    driver.memory.memory().write_slice(&[0xa5; 512], GuestAddress(0x70000)).unwrap();
    // VIRTIO_BLK_T_OUT, T_FLUSH, T_IN.
    assert_eq!(request(&mut driver, 1, 7, (0x70000, 512, false)), 0);
    assert_eq!(request(&mut driver, 4, 0, (0, 0, false)), 0);
    assert_eq!(std::fs::read(&image).unwrap()[7 * 512..8 * 512], [0xa5; 512]);
    assert_eq!(request(&mut driver, 0, 7, (12 << 20, 512, true)), 0);
    let mut read = [0; 512];
    driver.memory.memory().read_slice(&mut read, GuestAddress(12 << 20)).unwrap();
    assert_eq!(read, [0xa5; 512]);
    driver.active().pause();
    driver.active().resume();
    assert_eq!(request(&mut driver, 0, 7, (12 << 20, 512, true)), 0);

    let mut monitor = UnixStream::connect(&qmp).unwrap();
    monitor
        .write_all(
            b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"block_resize\",\"arguments\":{\"node-name\":\"image\",\"size\":2097152}}",
        )
        .unwrap();
    until("the disk grows", || capacity() == 4096);
    until("the driver is told", || driver.interrupts.seen().config >= 1);

    program.0.kill().unwrap();
    program.0.wait().unwrap();
    until("the device has stopped", || !driver.interrupts.seen().stopped.is_empty());
    assert_eq!(request(&mut driver, 0, 7, (12 << 20, 512, true)), 1);
    for path in [socket, image, qmp] {
        let _ = std::fs::remove_file(path);
    }
}

#[test]
#[ignore = "needs virtiofsd"]
fn virtiofsd_is_a_peer_that_begins_a_session_for_one_driver_after_the_other() {
    let (socket, dir) = (socket(), std::env::temp_dir());
    let words = [
        format!("--socket-path={}", socket.display()),
        format!("--shared-dir={}", dir.display()),
        "--sandbox=none".to_owned(),
    ];
    let _program = Program::start("virtiofsd", &words, &socket);
    let device = fs_at(&socket).unwrap();
    for _ in 0..2 {
        let mut driver = Driver::start(&device, shared_memory(), 2);
        // FUSE_INIT, version 7.31.
        let mut init = [0; 56];
        init[0] = 56;
        init[4] = 26;
        init[8] = 9;
        (init[40], init[44]) = (7, 31);
        driver.memory.memory().write_slice(&init, GuestAddress(0x60000)).unwrap();
        driver.queues[1].add(&[(0x60000, 56, false), (0x61000, 80, true)]);
        driver.queues[1].ring();
        driver.queues[1].wait_used().unwrap();
        let mut answer = [0; 32];
        driver.memory.memory().read_slice(&mut answer, GuestAddress(0x61000)).unwrap();
        assert_eq!((&answer[4..8], answer[8], answer[16]), (&[0; 4][..], 9, 7), "{answer:?}");
        driver.active().stop();
        assert!(driver.active().wait_stopped(LONG));
        assert_eq!(driver.interrupts.seen().stopped, [""; 0]);
    }
}

#[test]
#[ignore = "needs passt"]
fn passt_is_a_peer_whose_queues_start_and_stop() {
    let socket = socket();
    let words = [
        "--foreground".to_owned(),
        "--vhost-user".to_owned(),
        "--socket".to_owned(),
        socket.display().to_string(),
    ];
    let _program = Program::start("passt", &words, &socket);
    let device = net::new("_net0", &net_settings(&socket, Mode::Client, 2)).unwrap();
    let driver = Driver::start(&device, shared_memory(), 2);
    thread::sleep(Duration::from_millis(300));
    driver.active().pause();
    driver.active().resume();
    driver.active().stop();
    assert!(driver.active().wait_stopped(LONG));
    assert_eq!(driver.interrupts.seen().stopped, [""; 0]);
}
