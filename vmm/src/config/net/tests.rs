//! Tests of the network device's configuration.

use super::*;

fn error(text: &str) -> String {
    NetConfig::parse(text).unwrap().validate(4).unwrap_err().to_string()
}

#[test]
fn every_key_is_understood() {
    let config = NetConfig::parse(
        "tap=tap0,ip=10.0.0.1,mask=255.255.255.0,mac=12:34:56:78:90:AB,host_mac=02:00:00:00:00:01,mtu=9000,num_queues=4,\
         queue_size=512,vhost_mode=server,socket=/s,bw_size=1000,bw_refill_time=100,bw_one_time_burst=5,ops_size=10,ops_refill_time=7,\
         offload_tso=off,offload_ufo=off,offload_csum=off,id=net7,pci_device_id=9,vhost=off,iommu=off,pci_segment=0",
    )
    .unwrap();
    config.validate(2).unwrap();
    assert_eq!(
        (config.mac.to_string().as_str(), config.mtu, config.pairs()),
        ("12:34:56:78:90:ab", Some(9000), 2)
    );
    let limit = config.rate_limiter_config.unwrap();
    assert_eq!(limit.bandwidth.unwrap().one_time_burst, Some(5));
    assert_eq!(
        limit.ops.unwrap(),
        crate::config::rate_limit::TokenBucketConfig { size: 10, one_time_burst: None, refill_time: 7 }
    );
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<NetConfig>(&text).unwrap(), config);
}

#[test]
fn the_defaults_are_cloud_hypervisors_and_there_is_no_default_address() {
    let config: NetConfig = serde_json::from_str("{}").unwrap();
    config.validate(1).unwrap();
    let mut shown = serde_json::to_value(&config).unwrap();
    let mac = shown.as_object_mut().unwrap().remove("mac").unwrap();
    assert!(mac.as_str().unwrap().parse::<MacAddress>().is_ok());
    let expected = serde_json::json!({
        "pci_segment": 0, "num_queues": 2, "queue_size": 256, "vhost_user": false, "vhost_mode": "Client",
        "offload_tso": true, "offload_ufo": true, "offload_csum": true,
    });
    assert_eq!(shown, expected);
}

#[test]
fn a_random_address_is_locally_administered_and_of_one_station() {
    let addresses: std::collections::HashSet<_> = (0..50).map(|_| MacAddress::random()).collect();
    assert_eq!(addresses.len(), 50);
    assert!(addresses.iter().all(|mac| mac.0[0] & 3 == 2));
}

#[test]
fn link_addresses_are_six_pairs_of_digits() {
    for bad in [
        "",
        "12:34:56:78:90",
        "12:34:56:78:90:ab:cd",
        "1:2:3:4:5:6",
        "12:34:56:78:90:ag",
        "+1:34:56:78:90:ab",
    ] {
        assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        assert!(NetConfig::parse(&format!("mac={bad}")).is_err(), "{bad}");
    }
    assert!(serde_json::from_str::<NetConfig>(r#"{"mac":"nonsense"}"#).is_err());
}

#[test]
fn what_cannot_be_is_refused_with_its_name_and_a_remedy() {
    for (text, parts) in [
        ("num_queues=1", ["num_queues=1", "2, 4, 6"]),
        ("num_queues=3", ["num_queues=3", "2, 4, 6"]),
        ("num_queues=0", ["num_queues=0", "2, 4, 6"]),
        ("num_queues=514", ["num_queues=514", "512"]),
        ("num_queues=10", ["num_queues=10", "vCPUs (4)"]),
        ("fd=[3,4]", ["2 descriptors", "must be 4"]),
        ("fd=2", ["fd=2", "standard"]),
        ("queue_size=100", ["queue_size=100", "power of two"]),
        ("queue_size=1", ["queue_size=1", "power of two"]),
        ("mtu=1279", ["mtu=1279", "1280"]),
        ("offload_csum=off", ["offload_csum=off", "offload_tso=off"]),
        ("mac=01:00:5e:00:00:01", ["mac=01:00:5e", "group"]),
        ("host_mac=ff:ff:ff:ff:ff:ff", ["host_mac=ff", "group"]),
        ("ip=10.0.0.1,mask=ffff::", ["mask=ffff::", "both as IPv4"]),
        ("mask=255.0.0.0", ["mask=255.0.0.0", "(none)"]),
        ("vhost=on,bw_size=1000,bw_refill_time=10", ["vhost=on", "bw_size"]),
        ("vhost_user=on", ["vhost_user=on", "write socket=PATH"]),
    ] {
        let message = error(text);
        assert!(parts.iter().all(|part| message.contains(part)), "{text}: {message}");
    }
}

#[test]
fn descriptors_in_json_are_not_taken() {
    let config: NetConfig = serde_json::from_str(r#"{"fds":[5]}"#).unwrap();
    let message = config.validate(1).unwrap_err().to_string();
    assert!(message.contains("fd=-1") && message.contains("vm.add-net"), "{message}");
}

#[test]
fn half_a_limit_is_none() {
    for text in ["bw_size=1000", "ops_refill_time=10", "bw_size=0,bw_refill_time=5"] {
        assert_eq!(NetConfig::parse(text).unwrap().rate_limiter_config, None, "{text}");
    }
}
