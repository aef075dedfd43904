//! Tests of the command line.

use super::*;
use crate::config::{ConsoleMode, LostPolicy, PowerChoice, WakePolicy};

fn parse_words(line: &str) -> Result<Action, CliError> {
    parse(Program::Dormouse, std::iter::once("dormouse").chain(line.split_whitespace()))
}

fn machine(line: &str) -> (VmConfig, LogOptions) {
    match parse_words(line) {
        Ok(Action::Run { config: Some(config), log, .. }) => (*config, log),
        other => panic!("{line}: {other:?}"),
    }
}

fn error(line: &str) -> String {
    parse_words(line).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn a_machine_with_two_devices_is_read() {
    let (config, log) = machine(
        "--kernel k --initramfs i --cmdline quiet --cpus boot=2 --memory size=1G --serial tty --console off \
         --device path=/sys/bus/pci/devices/0000:01:00.0 path=/b,power=off,wake=ignore,hold_off=250 --log-file l -vv",
    );
    let payload = config.payload.unwrap();
    assert_eq!((payload.kernel.unwrap().to_str(), payload.cmdline.as_deref()), (Some("k"), Some("quiet")));
    assert_eq!((config.cpus.boot_vcpus, config.cpus.max_vcpus, config.memory.size), (2, 2, 1 << 30));
    assert_eq!((config.serial.mode, config.console.mode), (ConsoleMode::Tty, ConsoleMode::Off));
    let devices = config.devices.unwrap();
    assert_eq!(
        (devices[0].power, devices[0].wake, devices[0].hold_off),
        (PowerChoice::Auto, WakePolicy::Notify, None)
    );
    assert_eq!((devices[1].power, devices[1].wake), (PowerChoice::Off, WakePolicy::Ignore));
    assert_eq!(devices[1].hold_off, Some(250));
    assert_eq!(log, LogOptions { file: Some("l".into()), level: LevelFilter::Debug, format: None });
}

#[test]
fn every_power_key_of_a_device_is_read_and_wrong_ones_name_what_is_possible() {
    let (config, _) = machine(
        "--kernel k --device path=/a,power=d3hot,wake=host-only,toggle_rate=60,toggle_burst=5,wake_storm=30,\
         on_timeout=5000,on_lost=keep",
    );
    let device = config.devices.unwrap().remove(0);
    assert_eq!((device.power, device.wake), (PowerChoice::D3hot, WakePolicy::HostOnly));
    assert_eq!((device.toggle_rate, device.toggle_burst, device.wake_storm), (Some(60), Some(5), Some(30)));
    assert_eq!((device.on_timeout, device.on_lost), (Some(5000), Some(LostPolicy::Keep)));
    for (wrong, expected) in [
        ("power=d3cold", "auto, d3hot or off"),
        ("wake=never", "notify, ignore or host-only"),
        ("on_lost=panic", "reset or keep"),
        ("toggle_rate=fast", "toggle_rate"),
    ] {
        let line = format!("--kernel k --device path=/a,{wrong}");
        let error = error(&line);
        assert!(error.contains(expected), "{wrong}: {error}");
    }
}

#[test]
fn devices_can_be_repeated() {
    assert_eq!(machine("--kernel k --device path=/a --device path=/b path=/c").0.devices.unwrap().len(), 3);
}

#[test]
fn defaults_are_cloud_hypervisors_but_for_the_console() {
    let (config, log) = machine("--kernel k");
    assert_eq!((config.cpus, config.memory), (CpusConfig::default(), MemoryConfig::default()));
    assert_eq!((config.serial.mode, config.console.mode), (ConsoleMode::Null, ConsoleMode::Off));
    assert_eq!((config.devices, config.platform, log.level), (None, None, LevelFilter::Warn));
}

#[test]
fn a_command_line_may_start_with_a_hyphen() {
    let action = parse(Program::Dormouse, ["dormouse", "--kernel", "k", "--cmdline", "-- single"]).unwrap();
    let Action::Run { config: Some(config), .. } = action else { panic!("{action:?}") };
    assert_eq!(config.payload.unwrap().cmdline.as_deref(), Some("-- single"));
}

#[test]
fn no_argument_prints_help_and_version_prints_the_version() {
    assert!(
        matches!(parse_words(""), Ok(Action::Print(text)) if text.contains("Usage:") && !text.contains("--tpm"))
    );
    let version = concat!("dormouse v", env!("CARGO_PKG_VERSION"), "\n");
    for flag in ["--version", "-V"] {
        assert!(matches!(parse_words(flag), Ok(Action::Print(text)) if text == version));
    }
}

#[test]
fn every_option_that_is_not_there_yet_is_refused_by_name() {
    for name in NOT_YET {
        for line in
            [format!("--kernel k --{name}"), format!("--{name} a=b c=d"), format!("--{name}=x --kernel k")]
        {
            let message =
                format!("--{name} is not in Dormouse yet; leave it out, or see docs/compatibility.md");
            assert_eq!(error(&line), message, "{line}");
        }
    }
}

#[test]
fn a_filter_of_system_calls_can_be_asked_for_and_a_wrong_mode_is_refused() {
    for (mode, wanted) in [("true", true), ("log", true), ("errno", true), ("false", false)] {
        let line = format!("--kernel k --seccomp {mode}");
        assert!(
            matches!(parse_words(&line), Ok(Action::Run { options, .. }) if options.wants_filter == wanted),
            "{line}"
        );
    }
    assert!(matches!(parse_words("--kernel k"), Ok(Action::Run { options, .. }) if !options.wants_filter));
    assert!(error("--kernel k --seccomp maybe").contains("maybe"));
}

#[test]
fn the_form_of_log_lines_is_read_and_verbosity_adds_up() {
    let words = ["dormouse", "--kernel", "k", "-v", "-v", "-v", "--log-format", "{level} {msg}"];
    let action = parse(Program::Dormouse, words).unwrap();
    let Action::Run { log, .. } = action else { panic!("{action:?}") };
    assert_eq!((log.level, log.format), (LevelFilter::Trace, "{level} {msg}".parse().ok()));
    assert!(error("--kernel k --log-format {color}").contains("it takes {boottime}"));
}

#[test]
fn as_cloud_hypervisor_it_has_the_options_without_the_commands() {
    let words = |line: &str| -> Vec<String> {
        std::iter::once("/usr/bin/cloud-hypervisor")
            .chain(line.split_whitespace())
            .map(str::to_owned)
            .collect()
    };
    let parse = |line: &str| parse(Program::CloudHypervisor, words(line));
    let kata = parse("--api-socket /run/vc/vm/1/clh-api.sock -v -v --seccomp false").unwrap();
    assert!(matches!(kata, Action::Run { config: None, .. }), "{kata:?}");
    assert!(matches!(parse("--kernel k --cpus boot=2"), Ok(Action::Run { config: Some(_), .. })));
    assert!(parse("doctor").is_err() && parse("ctl ping").is_err());
    assert!(
        parse("--kernel k --tpm socket=s").unwrap_err().to_string().starts_with("--tpm is not in Dormouse")
    );
    let Ok(Action::Print(help)) = parse("--help") else { panic!() };
    assert!(help.contains("Usage: cloud-hypervisor") && !help.contains("doctor"), "{help}");
}

#[test]
fn the_version_is_read_by_libvirts_rule() {
    for flag in ["--version", "-V"] {
        let Ok(Action::Print(text)) = parse(Program::CloudHypervisor, ["cloud-hypervisor", flag]) else {
            panic!()
        };
        let (first, second) = text.trim_end().split_once('\n').unwrap();
        // The name with a blank goes, then all up to the last slash, then a v; a hyphen ends it.
        let rest = first.strip_prefix("cloud-hypervisor ").unwrap();
        let rest = rest.rsplit('/').next().unwrap();
        let number = rest.strip_prefix('v').unwrap_or(rest).split('-').next().unwrap();
        let parts: Vec<u32> = number.split('.').map(|part| part.parse().unwrap()).collect();
        assert_eq!(parts, [54, 0, 0], "{first}");
        assert!(second.starts_with("Migration Protocol Versions: "), "{second}");
    }
}

#[test]
fn as_ch_remote_it_has_the_commands_of_ctl_and_prints_json() {
    let parse =
        |line: &str| parse(Program::ChRemote, std::iter::once("ch-remote").chain(line.split_whitespace()));
    let Ok(Action::Ctl(args)) = parse("--api-socket /s add-device path=/d,id=gpu0") else { panic!() };
    assert_eq!((args.socket(), args.json), (Some("/s".into()), true));
    assert!(matches!(parse("--api-socket=/s info"), Ok(Action::Ctl(args)) if args.json));
    assert!(parse("--kernel k").is_err() && parse("ctl ping").is_err());
    let version = format!("ch-remote {}\n", multicall::VERSION);
    assert!(matches!(parse("--version"), Ok(Action::Print(text)) if text == version));
}

#[test]
fn mistakes_are_one_line() {
    for line in
        ["--nonsense", "--kernel", "--kernel k --cpus", "bind", "bind xyz", "frobnicate", "--kernel k -x"]
    {
        let message = error(line);
        assert!(!message.contains('\n') && !message.starts_with("error"), "{line}: {message:?}");
    }
    assert!(error("--kernel k --cpus bot=1").starts_with("--cpus has no key 'bot'; it takes boot, max,"));
    assert!(error("bind xyz").contains("xyz"));
}

#[test]
fn bind_and_unbind_take_an_address() {
    let bdf: Bdf = "0000:01:00.0".parse().unwrap();
    for (line, forced) in
        [("bind 0000:01:00.0", false), ("bind --force 01:00.0", true), ("bind 01:00.0 --force", true)]
    {
        assert!(
            matches!(parse_words(line), Ok(Action::Bind { bdf: b, force }) if b == bdf && force == forced),
            "{line}"
        );
    }
    assert!(matches!(parse_words("unbind 01:00.0"), Ok(Action::Unbind(b)) if b == bdf));
}

#[test]
fn the_doctor_takes_a_device_or_none_and_tries_only_a_named_one() {
    let options = |line: &str| match parse_words(line) {
        Ok(Action::Doctor(options)) => options,
        other => panic!("{line}: {other:?}"),
    };
    assert_eq!(options("doctor"), DoctorOptions { bdf: None, json: false, verify: false });
    let bdf = Some("0000:01:00.0".parse().unwrap());
    assert_eq!(options("doctor 01:00.0 --json"), DoctorOptions { bdf, json: true, verify: false });
    assert_eq!(options("doctor --verify 01:00.0"), DoctorOptions { bdf, json: false, verify: true });
    assert!(error("doctor --verify").contains("BDF"));
}

#[test]
fn commands_for_running_machines_are_read_and_their_mistakes_are_one_line() {
    let Ok(Action::Ctl(args)) = parse_words("ctl --api-socket /s add-device path=/d") else { panic!() };
    assert_eq!(args.socket(), Some("/s".into()));
    let Ok(Action::Top(args)) = parse_words("top --once --json --socket /a /b --interval 2") else {
        panic!()
    };
    assert_eq!((args.socket.len(), args.json, args.interval.as_secs()), (2, true, 2));
    assert!(matches!(parse_words("man /m"), Ok(Action::Man(directory)) if directory.as_os_str() == "/m"));
    for line in ["completions bash", "man", "ctl --help", "top --help"] {
        assert!(matches!(parse_words(line), Ok(Action::Print(text)) if text.contains("dormouse")), "{line}");
    }
    for (line, expected) in [
        ("ctl --api-socket /s", "subcommand"),
        ("ctl --api-socket /s explode", "explode"),
        ("ctl --api-socket /s resize --memory many", "a number of bytes"),
        ("top --json", "--once"),
        ("top --once --interval 0", "0.1 to 3600"),
        ("completions csh", "csh"),
    ] {
        let message = error(line);
        assert!(message.contains(expected) && !message.contains('\n'), "{line}: {message}");
    }
}
