//! Holds `docs/openapi.yaml` and `docs/api.md` against the code: the same endpoints, replies whose fields are known, and all metrics.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::testing::Server;
use super::{Access, routes};

fn document() -> Value {
    serde_saphyr::from_str(include_str!("../../../docs/openapi.yaml")).unwrap()
}

#[test]
fn every_endpoint_is_in_the_document_and_the_reverse() {
    let document = document();
    let described: BTreeSet<(String, String)> = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, methods)| {
            methods.as_object().unwrap().keys().map(move |method| (method.clone(), path.clone()))
        })
        .collect();
    let served: BTreeSet<(String, String)> =
        routes::all().map(|(method, path)| (method.to_owned(), path)).collect();
    assert_eq!(described, served);
}

#[test]
fn every_reference_in_the_document_leads_somewhere() {
    fn check(document: &Value, value: &Value) {
        if let Some(target) = value.get("$ref").and_then(Value::as_str) {
            assert!(document.pointer(target.trim_start_matches('#')).is_some(), "{target}");
        }
        match value {
            Value::Object(fields) => fields.values().for_each(|field| check(document, field)),
            Value::Array(items) => items.iter().for_each(|item| check(document, item)),
            _ => {}
        }
    }
    let document = document();
    check(&document, &document);
}

/// Every field of `reply` is a property of the schema, and every required one is there.
fn fits(schema: &str, reply: &Value) {
    let document = document();
    let schema = &document["components"]["schemas"][schema];
    let properties = schema["properties"].as_object().unwrap();
    let fields = reply.as_object().unwrap();
    for field in fields.keys() {
        assert!(properties.contains_key(field), "{field} is not in the document");
    }
    for field in schema["required"].as_array().into_iter().flatten() {
        assert!(fields.contains_key(field.as_str().unwrap()), "{field} is not in {reply}");
    }
}

#[test]
fn replies_have_the_fields_of_the_document() {
    let server = Server::start(Access::Full);
    let mut client = server.client();
    fits("Ping", &client.call("GET /api/v1/vmm.ping").json());
    let device =
        json!({"path": "/sys/bus/pci/devices/0000:01:00.0", "id": "gpu", "power": "off", "hold_off": 1});
    let body = json!({"devices": [device], "platform": {"uuid": "a"}, "payload": {"kernel": "/k"}});
    assert_eq!(client.put("vm.create", &body.to_string()).status, 204);
    let info = client.call("GET /api/v1/vm.info").json();
    fits("Info", &info);
    fits("VmConfig", &info["config"]);
    fits("Device", &info["config"]["devices"][0]);
    fits("Power", &client.call("GET /api/v1/vm.power").json());
}

#[test]
fn a_policy_has_the_fields_of_the_document() {
    let all = json!({
        "power": "off", "wake": "ignore", "hold_off": 1, "toggle_rate": 1, "toggle_burst": 1, "wake_storm": 1,
        "on_timeout": 1, "on_lost": "keep",
    });
    let change: vfio_pm::PolicyChange = serde_json::from_value(all.clone()).unwrap();
    assert_eq!(json!(change), all);
    fits("Policy", &all);
    let document = document();
    let schemas = &document["components"]["schemas"];
    let fields = |schema: &str| {
        schemas[schema]["properties"].as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>()
    };
    let known: BTreeSet<String> = all.as_object().unwrap().keys().cloned().collect();
    assert_eq!(fields("Policy"), known, "and no more");
    assert_eq!(&fields("PolicyChange") - &known, BTreeSet::from(["id".to_owned()]));
}

#[test]
fn every_endpoint_and_metric_is_in_the_users_documentation() {
    let text = include_str!("../../../docs/api.md");
    for (_, path) in routes::all() {
        let name = path.trim_start_matches("/api/v1/");
        assert!(text.contains(name), "{name}");
    }
    let server = Server::start(Access::Full);
    let metrics = server.client().call("GET /metrics").body;
    let families: Vec<(&str, &str)> =
        metrics.lines().filter_map(|line| line.strip_prefix("# TYPE dormouse_")?.split_once(' ')).collect();
    assert!(families.len() > 20, "{metrics}");
    for (name, kind) in families {
        let suffix = match kind {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        assert!(text.contains(&format!("`{name}{suffix}")), "{name}{suffix}");
    }
}
