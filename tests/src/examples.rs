//! Tests of docs/examples: each file is what a page shows, its syntax is right, and the files fit each other.
//!
//! TOML 1.1 by `toml`, YAML 1.2 by `saphyr`, XML 1.0 by `roxmltree`: the parsers that are kept up for each.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use roxmltree::Document;
use saphyr::{LoadableYamlNode, Yaml};
use toml::Table;

use crate::paths;

fn docs() -> PathBuf {
    paths::workspace().join("docs")
}

fn example(name: &str) -> String {
    let path = docs().join("examples").join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Texts of the fenced blocks of all pages, with the page and the language.
fn blocks() -> Vec<(String, String, String)> {
    let mut blocks = Vec::new();
    for entry in fs::read_dir(docs()).unwrap().flatten() {
        let page = entry.file_name().into_string().unwrap();
        if !page.ends_with(".md") {
            continue;
        }
        let text = fs::read_to_string(entry.path()).unwrap();
        let mut open: Option<(String, String)> = None;
        for line in text.lines() {
            match (line.strip_prefix("```"), open.take()) {
                (Some(language), None) => open = Some((language.to_owned(), String::new())),
                (Some(_), Some((language, text))) => blocks.push((page.clone(), language, text)),
                (None, Some((language, text))) => open = Some((language, format!("{text}{line}\n"))),
                (None, None) => {}
            }
        }
        assert!(open.is_none(), "{page}: a block is never closed");
    }
    blocks
}

fn files() -> BTreeMap<String, String> {
    let entries = fs::read_dir(docs().join("examples")).unwrap().flatten();
    entries
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            let text = example(&name);
            (name, text)
        })
        .collect()
}

fn toml(name: &str) -> Table {
    example(name).parse().unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn yaml(text: &str) -> Vec<Yaml<'_>> {
    Yaml::load_from_str(text).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn every_block_of_a_page_is_a_file_that_the_page_names_and_every_file_is_shown() {
    let files = files();
    let mut shown = BTreeSet::new();
    for (page, language, text) in blocks() {
        if !["toml", "yaml", "xml", "udev"].contains(&language.as_str()) {
            continue;
        }
        let same = files.iter().find(|(_, content)| **content == text);
        let (name, _) = same.unwrap_or_else(|| panic!("{page}: this {language} is no file:\n{text}"));
        let page_text = fs::read_to_string(docs().join(&page)).unwrap();
        assert!(page_text.contains(&format!("(examples/{name})")), "{page} does not name {name}");
        shown.insert(name.clone());
    }
    let unseen: Vec<_> = files.keys().filter(|name| !shown.contains(*name)).collect();
    assert!(unseen.is_empty(), "no page shows {unseen:?}");
}

#[test]
fn every_file_has_the_syntax_of_its_kind() {
    for (name, text) in files() {
        match name.rsplit('.').next() {
            Some("toml") => drop(toml(&name)),
            Some("yaml" | "yml") => assert!(!yaml(&text).is_empty(), "{name}"),
            Some("xml") => drop(Document::parse(&text).unwrap_or_else(|e| panic!("{name}: {e}"))),
            Some("rules") => udev_rules(&name, &text),
            _ => panic!("{name}: nobody knows its syntax"),
        }
    }
}

/// udev(7): comments, and lines of keys with an operator and a value in double quotes.
fn udev_rules(name: &str, text: &str) {
    let rules = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let mut count = 0;
    for rule in rules {
        count += 1;
        for part in rule.split(", ") {
            let end = part.find(['=', '!', '+', '-', ':']).unwrap_or_else(|| panic!("{name}: {part}"));
            let (key, rest) = part.split_at(end);
            let operator = ["==", "!=", "+=", "-=", ":=", "="].into_iter().find(|op| rest.starts_with(op));
            let value =
                operator.and_then(|op| rest.strip_prefix(op)).unwrap_or_else(|| panic!("{name}: {part}"));
            let quoted = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
            assert!(quoted.is_some_and(|value| !value.contains('"')), "{name}: {part}");
            let known = ["ACTION", "SUBSYSTEM", "TEST", "ATTR", "KERNEL", "DRIVER", "RUN"];
            assert!(known.contains(&key.split('{').next().unwrap_or_default()), "{name}: {part}");
        }
    }
    assert!(count > 0, "{name} has no rule");
}

#[test]
fn kata_starts_the_link_with_a_size_that_does_not_change() {
    let config = toml("kata-dormouse.toml");
    let clh = config["hypervisor"]["clh"].as_table().unwrap();
    let path = clh["path"].as_str().unwrap();
    assert!(path.ends_with("/cloud-hypervisor"), "{path}");
    assert!(
        clh["valid_hypervisor_paths"].as_array().unwrap().iter().any(|valid| valid.as_str() == Some(path))
    );
    assert_eq!(clh["default_vcpus"], clh["default_maxvcpus"]);
    assert_eq!(config["runtime"]["static_sandbox_resource_mgmt"].as_bool(), Some(true));
}

#[test]
fn pod_runtime_class_and_containerd_name_the_same_runtime() {
    let text = example("kubernetes-gpu.yaml");
    let documents = yaml(&text);
    let [class, pod] = documents.as_slice() else { panic!("{} documents", documents.len()) };
    assert_eq!((class["kind"].as_str(), pod["kind"].as_str()), (Some("RuntimeClass"), Some("Pod")));
    assert_eq!(pod["spec"]["runtimeClassName"].as_str(), class["metadata"]["name"].as_str());
    let handler = class["handler"].as_str().unwrap();
    let containerd = toml("containerd-kata.toml");
    let runtimes = &containerd["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"];
    assert_eq!(runtimes[handler]["runtime_type"].as_str(), Some("io.containerd.kata.v2"));
    // An annotation of the pod must be let through, and be one that Kata allows.
    let prefix = "io.katacontainers.config.hypervisor.";
    let kata = toml("kata-dormouse.toml");
    let allowed = kata["hypervisor"]["clh"]["enable_annotations"].as_array().unwrap();
    for (name, _) in pod["metadata"]["annotations"].as_mapping().unwrap() {
        let name = name.as_str().unwrap();
        let key = name.strip_prefix(prefix).unwrap_or_else(|| panic!("{name}"));
        assert!(allowed.iter().any(|allowed| allowed.as_str() == Some(key)), "{name} is not allowed");
    }
    assert_eq!(runtimes[handler]["pod_annotations"][0].as_str(), Some("io.katacontainers.*"));
}

#[test]
fn the_domain_has_nothing_that_dormouse_refuses() {
    let text = example("libvirt-domain.xml");
    let document = Document::parse(&text).unwrap();
    let domain = document.root_element();
    assert_eq!((domain.tag_name().name(), domain.attribute("type")), ("domain", Some("kvm")));
    let find = |name: &str| domain.descendants().filter(|node| node.has_tag_name(name)).collect::<Vec<_>>();
    for absent in ["disk", "interface", "console", "graphics", "filesystem", "vsock"] {
        assert!(find(absent).is_empty(), "<{absent}>");
    }
    assert!(find("emulator")[0].text().is_some_and(|path| path.ends_with("/cloud-hypervisor")));
    assert!(find("vcpu")[0].attribute("current").is_none());
    assert!(find("kernel").len() == 1 && find("initrd").len() == 1);
    let devices = find("hostdev");
    assert!(!devices.is_empty());
    for device in devices {
        assert_eq!((device.attribute("type"), device.attribute("managed")), (Some("pci"), Some("no")));
        let address = device.descendants().find(|node| node.has_tag_name("address")).unwrap();
        for part in ["domain", "bus", "slot", "function"] {
            let value = address.attribute(part).and_then(|value| value.strip_prefix("0x"));
            assert!(value.is_some_and(|value| u16::from_str_radix(value, 16).is_ok()), "{part}");
        }
    }
}
