//! `--disk`, its JSON, and what is refused.

use super::*;

fn error(text: &str) -> String {
    let config = VmConfig {
        disks: Some(vec![DiskConfig::parse(text).unwrap()]),
        rate_limit_groups: Some(vec![
            RateLimitGroupConfig::parse("id=g,ops_size=5,ops_refill_time=9").unwrap(),
        ]),
        ..VmConfig::default()
    };
    config.validate_disks().map(|()| String::new()).unwrap_or_else(|e| e.to_string())
}

#[test]
fn every_key_of_a_disk_is_read_and_shown_under_its_name_in_json() {
    let text = "path=/d,readonly=on,direct=on,num_queues=2,queue_size=64,id=d,pci_device_id=7,serial=abc,\
        rate_limit_group=g,queue_affinity=[0@[1-2],1@[3]],backing_files=on,sparse=off,image_type=qcow2,lock_granularity=full,\
        _disable_io_uring=on,_disable_aio=on,bw_size=10,bw_one_time_burst=20,bw_refill_time=30,ops_size=1,ops_refill_time=2";
    let config = DiskConfig::parse(text).unwrap();
    let json = serde_json::to_value(&config).unwrap();
    let expected = serde_json::json!({
        "id": "d", "pci_segment": 0, "pci_device_id": 7, "path": "/d", "readonly": true, "direct": true, "num_queues": 2,
        "queue_size": 64, "vhost_user": false, "rate_limit_group": "g",
        "rate_limiter_config": {
            "bandwidth": {"size": 10, "one_time_burst": 20, "refill_time": 30}, "ops": {"size": 1, "refill_time": 2}
        },
        "disable_io_uring": true, "disable_aio": true, "serial": "abc",
        "queue_affinity": [{"queue_index": 0, "host_cpus": [1, 2]}, {"queue_index": 1, "host_cpus": [3]}],
        "backing_files": true, "sparse": false, "image_type": "Qcow2", "lock_granularity": "Full"
    });
    assert_eq!(json, expected);
    assert_eq!(serde_json::from_value::<DiskConfig>(json).unwrap(), config);
}

#[test]
fn a_disk_of_a_path_alone_has_the_defaults_of_cloud_hypervisor() {
    let config: DiskConfig = serde_json::from_str(r#"{"path": "/d"}"#).unwrap();
    assert_eq!(config, DiskConfig::parse("path=/d").unwrap());
    assert_eq!((config.num_queues, config.queue_size, config.sparse), (1, 128, true));
    assert_eq!(config.image_type, ImageType::Unknown);
    assert_eq!(error("path=/d"), "");
    assert_eq!(error("path=/d,rate_limit_group=g"), "");
}

#[test]
fn what_makes_no_sense_is_refused_with_what_to_do() {
    for (text, expected) in [
        ("readonly=on", "path=FILE"),
        ("path=/d,num_queues=0", "num_queues=0"),
        ("path=/d,num_queues=2", "number of vCPUs, which is 1"),
        ("path=/d,queue_size=100", "power of two"),
        ("path=/d,queue_size=2", "power of two"),
        ("path=/d,serial=123456789012345678901", "20 bytes"),
        ("path=/d,queue_affinity=[1@[0]]", "no queue 1"),
        ("path=/d,rate_limit_group=h", "--rate-limit-group id=h"),
        ("path=/d,rate_limit_group=g,bw_size=1,bw_refill_time=1", "do not go together"),
        ("vhost_user=on", "write socket=PATH"),
        ("path=/d,vhost_user=on,socket=/s", "do not go together"),
        ("path=/d,socket=/s", "vhost_user=on only"),
    ] {
        let error = error(text);
        assert!(error.contains(expected), "{text}: {error}");
    }
    let error = DiskConfig::parse("path=/d,image_type=vdi").unwrap_err().to_string();
    assert!(error.contains("'vdi' is no value for image_type"), "{error}");
}

#[test]
fn groups_need_names_of_their_own_and_a_limit() {
    let error = |groups: &[&str]| {
        let groups = groups.iter().map(|text| RateLimitGroupConfig::parse(text).unwrap()).collect();
        let config = VmConfig { rate_limit_groups: Some(groups), ..VmConfig::default() };
        config.validate_disks().unwrap_err().to_string()
    };
    assert!(error(&["id=a"]).contains("limits nothing"));
    assert!(error(&["bw_size=1,bw_refill_time=1"]).contains("needs a name"));
    assert!(
        error(&["id=a,bw_size=1,bw_refill_time=1", "id=a,bw_size=1,bw_refill_time=1"])
            .contains("name of its own")
    );
}
