//! The whole way from sockets to text: VMMs that answer the bytes of the contract, hang, or have gone.

use std::os::unix::net::UnixListener;
use std::time::Instant;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::style::Color;
use serde_json::{Value, json};

use super::board::{Answer, Board, Vm};
use super::collect::News;
use super::screen::Scroll;
use super::sensors::{Draw, Meter};
use super::*;
use crate::client::fixture;
use crate::client::peer::{Answer as Reaction, Peer, Scratch, reply};

/// A VMM with a VM.
fn running(socket: &std::path::Path, pid: u32) -> Peer {
    Peer::serve(socket, move |line, _| {
        let body = match line {
            "GET /api/v1/vmm.ping" => fixture::ping(pid),
            "GET /api/v1/vm.info" => fixture::info(),
            "GET /api/v1/vm.power" => fixture::power(),
            _ => return Reaction::Bytes(reply(404, r#"["Not Found"]"#)),
        };
        Reaction::Bytes(reply(200, &body.to_string()))
    })
}

/// A host without sensors.
fn no_sensors(scratch: &Scratch) -> Meter {
    Meter::new(scratch.path("no-sysfs"))
}

fn directory(scratch: &Scratch) -> Source {
    Source::Directory(scratch.path(""))
}

fn text(board: &Board, source: &Source) -> String {
    anstream::adapter::strip_str(&once::table(board, source)).to_string()
}

/// What the fixture's VM has said, without a socket.
fn vm(pid: u32, raw: Value) -> Vm {
    let power = serde_json::from_value(raw.clone()).unwrap();
    let answer = Answer { power, raw, draw: [].into() };
    Vm { socket: format!("/run/dormouse/{pid}.sock").into(), pid: Some(pid), name: None, answer: Ok(answer) }
}

fn screen(board: &Board, width: u16, height: u16, scroll: &mut Scroll) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    let source = Source::Directory("/run/dormouse".into());
    terminal.draw(|frame| screen::draw(frame, board, &source, scroll)).unwrap();
    terminal.backend().buffer().clone()
}

fn lines(buffer: &Buffer) -> Vec<String> {
    let line = |y: u16| (0..buffer.area.width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
    (0..buffer.area.height).map(|y| line(y).trim_end().to_owned()).collect()
}

#[test]
fn one_look_is_a_table_of_all_devices_of_all_vms() {
    let scratch = Scratch::new();
    let _first = running(&scratch.path("77.sock"), 77);
    let _second = running(&scratch.path("1234.sock"), 1234);
    scratch.write("readme", "no socket");
    let source = directory(&scratch);
    let board = collect::once(&source, no_sensors(&scratch)).unwrap();
    let devices = "
  DEVICE  HOST          STATE  SINCE       POWER   LOW POWER  LAST WAKE           DOWN / UP       POLICY               TROUBLE
  gpu0    0000:01:00.0  off    1 min 30 s  D3cold  90.0 %     pme, 2 min 5 s ago  450 us / 13 ms  auto notify 200 ms   -
  _vfio1  0000:02:00.0  on     1 h 1 min   D0      0.0 %      -                   -               d3hot notify 200 ms  -
  nvme    0000:03:00.0  lost   5.0 s       -       0.0 %      -                   -               auto notify 50 ms    latched: no-answer 2x
";
    let head = |pid: u32| format!("VM {pid}  Running  9a6f3c1e-8d0b-4a56-b1d7-2f0c5a8e7b64  3 devices");
    assert_eq!(text(&board, &source), format!("{}{devices}\n{}{devices}", head(77), head(1234)));
}

#[test]
fn a_vmm_that_hangs_and_one_that_has_gone_keep_nobody_waiting() {
    let scratch = Scratch::new();
    let _running = running(&scratch.path("1.sock"), 1);
    let _hanging = Peer::serve(&scratch.path("2.sock"), |_, _| Reaction::Silence);
    let _hanging_too = Peer::serve(&scratch.path("3.sock"), |_, _| Reaction::Silence);
    drop(UnixListener::bind(scratch.path("4.sock")).unwrap());
    let source = directory(&scratch);
    let begin = Instant::now();
    let board = collect::once(&source, no_sensors(&scratch)).unwrap();
    assert!(begin.elapsed() < 2 * collect::PATIENCE, "{:?}", begin.elapsed());
    assert_eq!((board.vms().len(), board.failed()), (3, 2));
    let text = text(&board, &source);
    assert!(text.contains("VM 1  Running") && text.contains("gpu0"), "{text}");
    assert!(text.contains("VM 2  no reply to vmm.ping within 0.9 s"), "{text}");
    assert!(!text.contains("VM 4"), "{text}");
}

#[test]
fn a_socket_that_was_named_is_shown_whatever_becomes_of_it() {
    let scratch = Scratch::new();
    let _running = running(&scratch.path("api"), 5);
    let source = Source::Named(vec![scratch.path("missing"), scratch.path("api")]);
    let board = collect::once(&source, no_sensors(&scratch)).unwrap();
    let text = text(&board, &source);
    assert!(text.contains("missing  there is no such socket") && text.contains("VM 5  Running"), "{text}");
    assert_eq!(board.failed(), 1);
}

#[test]
fn a_vmm_without_the_power_call_or_with_another_answer_is_shown_with_the_reason() {
    let scratch = Scratch::new();
    let _other = Peer::serve(&scratch.path("1.sock"), |line, _| match line {
        "GET /api/v1/vmm.ping" => Reaction::Bytes(reply(200, &fixture::ping(1).to_string())),
        "GET /api/v1/vm.info" => Reaction::Bytes(reply(404, r#"["VM is not created"]"#)),
        _ => Reaction::Bytes(reply(404, r#"["Not Found"]"#)),
    });
    let _odd = Peer::serve(&scratch.path("2.sock"), |_, _| Reaction::Bytes(reply(200, "[]")));
    let source = directory(&scratch);
    let text = text(&collect::once(&source, no_sensors(&scratch)).unwrap(), &source);
    assert!(
        text.contains("VM 1") && text.contains("vm.power: Not Found; this VMM has no such call"),
        "{text}"
    );
    assert!(text.contains("VM 2") && text.contains("the reply to vm.power cannot be read"), "{text}");
}

#[test]
fn a_vmm_that_has_no_vm_yet_is_no_failure_and_its_name_is_asked_for_when_it_has_one() {
    let scratch = Scratch::new();
    let created = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let is_created = std::sync::Arc::clone(&created);
    let none = r#"["Error from API","The power of the VM's devices is not available","VM is not created"]"#;
    let _vmm = Peer::serve(&scratch.path("1.sock"), move |line, _| {
        let there = is_created.load(std::sync::atomic::Ordering::SeqCst);
        Reaction::Bytes(match (line, there) {
            ("GET /api/v1/vmm.ping", _) => reply(200, &fixture::ping(1).to_string()),
            (_, false) => reply(404, none),
            ("GET /api/v1/vm.info", true) => reply(200, &fixture::info().to_string()),
            _ => reply(200, &fixture::power().to_string()),
        })
    });
    let source = directory(&scratch);
    let board = collect::once(&source, no_sensors(&scratch)).unwrap();
    assert_eq!((text(&board, &source).as_str(), board.failed()), ("VM 1  no VM  no assigned device\n", 0));

    let news = collect::watch(source, Duration::from_millis(20), no_sensors(&scratch));
    let seen = || match news.recv_timeout(Duration::from_secs(10)).unwrap() {
        News::Vm(vm) => vm,
        other => panic!("{other:?}"),
    };
    assert_eq!(seen().name, None);
    created.store(true, std::sync::atomic::Ordering::SeqCst);
    let named = (0..100).map(|_| seen()).find(|vm| vm.name.is_some()).unwrap();
    assert_eq!(named.answer.unwrap().power.devices.len(), 3);
}

#[test]
fn a_device_that_the_vmm_knows_nothing_of_is_left_out_and_its_neighbours_keep_what_is_theirs() {
    let mut power = fixture::power();
    power["devices"].as_array_mut().unwrap().insert(0, Value::Null);
    let mut board = Board::default();
    board.update(vm(1, power));
    let json: Value = serde_json::from_str(&once::json(&board).unwrap()).unwrap();
    let devices = json["vms"][0]["devices"].as_array().unwrap();
    assert_eq!(
        (devices.len(), &devices[0]["id"], &devices[0]["low_power_percent"]),
        (3, &json!("gpu0"), &json!(90.0))
    );
}

#[test]
fn without_any_vm_it_says_so() {
    let scratch = Scratch::new();
    let source = Source::Directory(scratch.path("none-yet"));
    let board = collect::once(&source, no_sensors(&scratch)).unwrap();
    assert!(text(&board, &source).starts_with("No virtual machine runs: "));
    let json: Value = serde_json::from_str(&once::json(&board).unwrap()).unwrap();
    assert_eq!(json, json!({"version": 1, "vms": []}));
    let shown = lines(&screen(&board, 60, 5, &mut Scroll::default()));
    assert_eq!(shown[2], "No virtual machine runs (/run/dormouse).");
}

#[test]
fn json_has_what_the_vmm_said_and_what_is_measured_beside_it() {
    let scratch = Scratch::new();
    let _running = running(&scratch.path("9.sock"), 9);
    let _hanging = Peer::serve(&scratch.path("10.sock"), |_, _| Reaction::Silence);
    scratch.write("sys/devices/0000:02:00.0/hwmon/hwmon0/power1_input", "4200000\n");
    scratch.write("sys/bus/pci/devices/.keep", "");
    let link = scratch.path("sys/bus/pci/devices/0000:02:00.0");
    std::os::unix::fs::symlink(scratch.path("sys/devices/0000:02:00.0"), link).unwrap();
    let meter = Meter::new(scratch.path("sys"));
    let board = collect::once(&directory(&scratch), meter).unwrap();
    let json: Value = serde_json::from_str(&once::json(&board).unwrap()).unwrap();
    let vms = json["vms"].as_array().unwrap();
    assert_eq!((&vms[0]["pid"], &vms[0]["state"]), (&json!(9), &json!("Running")));
    let said = fixture::power();
    for (device, said) in
        vms[0]["devices"].as_array().unwrap().iter().zip(said["devices"].as_array().unwrap())
    {
        for (key, value) in said.as_object().unwrap() {
            assert_eq!(&device[key], value, "{key}");
        }
    }
    assert_eq!(vms[0]["devices"][0]["low_power_percent"], json!(90.0));
    assert_eq!(vms[0]["devices"][1]["watts"], json!(4.2));
    assert!(vms[0]["devices"][0].get("watts").is_none());
    assert!(vms[1]["error"].as_str().unwrap().contains("no reply") && vms[1].get("devices").is_none());
    assert!(text(&board, &directory(&scratch)).contains("  WATTS  "));
}

#[test]
fn one_look_has_no_escape_codes_but_its_colours() {
    let mut board = Board::default();
    let mut odd = vm(1, fixture::power());
    odd.name = Some("\x1b]0;title\x07\x1b[2J".to_owned());
    board.update(odd);
    let coloured = once::table(&board, &Source::Named(Vec::new()));
    assert!(coloured.contains("\x1b[") && !coloured.contains("\x1b]") && !coloured.contains("\x1b[2J"));
    let plain = text(&board, &Source::Named(Vec::new()));
    assert!(!plain.contains('\x1b') && plain.contains("?]0;title??[2J"), "{plain}");
}

#[test]
fn a_wide_screen_has_bars_and_history() {
    let mut board = Board::default();
    board.update(vm(77, fixture::power()));
    let mut awake = fixture::power();
    awake["devices"][0]["state"] = "on".into();
    awake["devices"][1]["offered"] = false.into();
    awake["devices"][1]["policy"]["power"] = "auto".into();
    board.update(vm(77, awake));
    let shown = lines(&screen(&board, 190, 8, &mut Scroll::default()));
    assert!(shown[5].contains("not offered to the guest"), "{}", shown[5]);
    board.update(vm(77, fixture::power()));
    board.platform = Some(43.21);
    let shown = lines(&screen(&board, 190, 8, &mut Scroll::default()));
    assert_eq!(shown[0], "dormouse top  1 VM, 3 devices, 1 in low power, 1 lost  platform 43.2 W");
    assert_eq!(shown[2], "VM 77  Running  3 devices");
    assert!(
        shown[3].starts_with("DEVICE  HOST          STATE  SINCE       POWER   LOW POWER "),
        "{}",
        shown[3]
    );
    assert!(shown[4].contains("█████████·  90.0 %") && shown[4].contains("▁█▁"), "{}", shown[4]);
    assert!(shown[6].contains("xxx") && shown[6].contains("latched: no-answer 2x"), "{}", shown[6]);
    assert_eq!(shown[7], "q quit");
}

#[test]
fn sleep_is_cyan_what_is_on_is_green_and_what_is_lost_is_red() {
    let mut board = Board::default();
    board.update(vm(77, fixture::power()));
    let buffer = screen(&board, 190, 8, &mut Scroll::default());
    let state = u16::try_from(lines(&buffer)[3].find("STATE").unwrap()).unwrap();
    let colours = [4, 5, 6].map(|line| buffer[(state, line)].fg);
    assert_eq!(colours, [Color::Cyan, Color::Green, Color::Red]);
}

#[test]
fn a_narrow_screen_keeps_the_device_its_state_and_its_trouble() {
    let mut board = Board::default();
    board.update(vm(77, fixture::power()));
    let shown = lines(&screen(&board, 80, 8, &mut Scroll::default()));
    assert!(shown[3].starts_with("DEVICE  HOST          STATE  POWER"), "{}", shown[3]);
    assert!(shown[6].contains("latched: no-answer 2x"), "{}", shown[6]);
    let shown = lines(&screen(&board, 24, 8, &mut Scroll::default()));
    assert_eq!(shown[3], "DEVICE  STATE  POWER");
    assert_eq!(shown[4], "gpu0    off    D3cold");
}

#[test]
fn no_size_of_a_terminal_is_too_small() {
    let mut board = Board::default();
    board.update(vm(1, fixture::power()));
    board.update(Vm { answer: Err("no reply".to_owned()), ..vm(2, fixture::power()) });
    for width in (1..60).step_by(3) {
        for height in 1..12 {
            for offset in [0, 3, usize::MAX] {
                screen(&board, width, height, &mut Scroll { offset, ..Scroll::default() });
            }
        }
    }
    let shown = lines(&screen(&board, 40, 10, &mut Scroll::default()));
    assert!(shown[2].starts_with("VM 1") && shown[4].starts_with("gpu0") && shown[9].starts_with("q quit"));
}

#[test]
fn a_screen_that_is_too_short_scrolls_and_says_where_it_is() {
    let mut board = Board::default();
    (1..=4).for_each(|pid| board.update(vm(pid, fixture::power())));
    let mut scroll = Scroll::default();
    let first = lines(&screen(&board, 60, 8, &mut scroll));
    assert_eq!((first[2].split("  ").next(), scroll.lines), (Some("VM 1"), 24));
    assert!(first[7].ends_with("scroll, 6 of 24"), "{}", first[7]);
    scroll.by(isize::MAX);
    let last = lines(&screen(&board, 60, 8, &mut scroll));
    assert!(last[6].starts_with("nvme") && last[7].ends_with("scroll, 24 of 24"), "{last:?}");
    // What is gone does not leave the display behind the end.
    (2..=4).for_each(|pid| board.remove(&format!("/run/dormouse/{pid}.sock").into()));
    let left = lines(&screen(&board, 60, 8, &mut scroll));
    assert!(left[2].starts_with("VM 1") && scroll.offset == 0, "{left:?}");
}

#[test]
fn the_history_is_short_and_forgets_devices_that_have_gone() {
    let mut board = Board::default();
    (0..100).for_each(|_| board.update(vm(1, fixture::power())));
    let one = board.vms()[0].clone();
    assert_eq!(board.history(&one, "gpu0").count(), board::HISTORY);
    board.update(Vm { answer: Err("hangs".to_owned()), ..one.clone() });
    assert_eq!(board.history(&one, "gpu0").next_back(), Some(board::Depth::Unknown));
    board.update(vm(1, json!({"state": "Running", "devices": []})));
    assert_eq!(board.history(&one, "gpu0").count(), 0);
}

#[test]
fn watts_are_a_column_only_where_they_are_measured() {
    let mut board = Board::default();
    let mut measured = vm(1, fixture::power());
    board.update(measured.clone());
    assert!(!lines(&screen(&board, 200, 8, &mut Scroll::default()))[3].contains("WATTS"));
    let draw = Draw { watts: 7.25, shared: true };
    measured.answer.as_mut().unwrap().draw.insert("0000:01:00.0".to_owned(), draw);
    board.update(measured);
    let shown = lines(&screen(&board, 200, 8, &mut Scroll::default()));
    assert!(shown[3].contains("WATTS") && shown[4].contains("7.2 (port)"), "{shown:?}");
}

#[test]
fn a_vmm_that_hangs_does_not_slow_the_display_of_others() {
    let scratch = Scratch::new();
    let _running = running(&scratch.path("1.sock"), 1);
    let _hanging = Peer::serve(&scratch.path("2.sock"), |_, _| Reaction::Silence);
    let news = collect::watch(directory(&scratch), Duration::from_millis(50), no_sensors(&scratch));
    let (begin, mut good) = (Instant::now(), 0);
    let bad = loop {
        match news.recv_timeout(Duration::from_secs(10)).unwrap() {
            News::Vm(vm) if vm.answer.is_ok() => good += 1,
            News::Vm(vm) => break vm,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((bad.pid, bad.answer.is_err()), (Some(2), true));
    assert!(good >= 3, "{good} looks at the one in {:?}", begin.elapsed());
}

#[test]
fn vms_come_and_go_while_one_looks() {
    let scratch = Scratch::new();
    let news = collect::watch(directory(&scratch), Duration::from_millis(20), no_sensors(&scratch));
    let listener = UnixListener::bind(scratch.path("8.sock")).unwrap();
    drop(listener);
    let gone = news.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(matches!(&gone, News::Gone(socket) if socket.ends_with("8.sock")), "{gone:?}");
    let _running = running(&scratch.path("9.sock"), 9);
    let seen = std::iter::from_fn(|| news.recv_timeout(Duration::from_secs(10)).ok())
        .any(|news| matches!(news, News::Vm(vm) if vm.pid == Some(9) && vm.answer.is_ok()));
    assert!(seen);
}

#[test]
fn status_sockets_are_in_the_order_of_their_processes() {
    let scratch = Scratch::new();
    for name in ["100.sock", "20.sock", "3.sock", "x.sock", "4.lock"] {
        scratch.write(name, "");
    }
    let found = directory(&scratch).sockets().unwrap();
    let names: Vec<_> = found.iter().filter_map(|path| path.file_name()?.to_str()).collect();
    assert_eq!(names, ["3.sock", "20.sock", "100.sock"]);
    scratch.write("plain", "");
    let error = Source::Directory(scratch.path("plain")).sockets().unwrap_err().to_string();
    assert!(error.contains("plain: Not a directory") && error.contains("--socket"), "{error}");
}

#[test]
fn the_interval_has_bounds() {
    assert_eq!(interval("0.5"), Ok(Duration::from_millis(500)));
    for wrong in ["0", "-1", "NaN", "inf", "4000", "x"] {
        assert!(interval(wrong).unwrap_err().contains("0.1 to 3600"), "{wrong}");
    }
}

#[test]
fn the_history_takes_the_room_that_is_left_and_shows_the_last_looks() {
    let mut board = Board::default();
    (0..50).for_each(|_| board.update(vm(1, fixture::power())));
    let mut awake = fixture::power();
    awake["devices"][0]["state"] = "on".into();
    board.update(vm(1, awake));
    let marks = |width: u16| {
        let shown = lines(&screen(&board, width, 8, &mut Scroll::default()));
        assert!(shown.iter().all(|line| line.chars().count() <= usize::from(width)), "{shown:?}");
        let marks: String = shown[4].chars().filter(|c| *c == '▁' || *c == '█').collect();
        // The bar of the low-power column comes first.
        marks.trim_start_matches('█').to_owned()
    };
    let wide = marks(230);
    assert_eq!((wide.chars().count(), wide.chars().last()), (51, Some('█')));
    let narrow = marks(115);
    assert!((10..51).contains(&narrow.chars().count()) && narrow.ends_with("▁█"), "{narrow}");
}
