//! The kernel of these tests lives in a temporary directory: a write to `unbind` or `drivers_probe` moves the device's
//! `driver` link as the kernel would.

use std::cell::{Cell, RefCell};

use super::super::host::fake::Tree;
use super::*;

const NIC: u32 = 0x02_00_00;
const PORT: u32 = 0x06_04_00;
const GPU: &str = "0000:01:00.0";
const AUDIO: &str = "0000:01:00.1";

#[derive(Debug)]
struct FakeKernel<'a> {
    tree: &'a Tree,
    /// Which driver the kernel finds for a function without an override.
    native: Vec<(&'a str, &'a str)>,
    /// A function that vfio-pci does not take.
    refuses: Cell<Option<&'a str>>,
    modules: RefCell<Vec<String>>,
    loads: bool,
}

impl<'a> FakeKernel<'a> {
    fn new(tree: &'a Tree) -> Self {
        Self {
            tree,
            native: vec![(GPU, "nouveau"), (AUDIO, "snd_hda_intel")],
            refuses: Cell::new(None),
            modules: RefCell::default(),
            loads: true,
        }
    }
}

impl Kernel for &FakeKernel<'_> {
    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        assert!(path.starts_with(self.tree.root()), "{}", path.display());
        match path.file_name().unwrap().to_str().unwrap() {
            "driver_override" | "control" => fs::write(path, text)?,
            "unbind" => {
                let driver = path.parent().unwrap().canonicalize()?;
                let bound = self.tree.dir(text).join("driver").canonicalize()?;
                assert_eq!(driver, bound, "only a device's own driver can be unbound");
                self.tree.unbind(text);
            }
            "drivers_probe" => {
                let dir = self.tree.dir(text);
                let wanted = fs::read_to_string(dir.join("driver_override"))?;
                let native = self.native.iter().find(|(bdf, _)| *bdf == text).map(|(_, driver)| *driver);
                let driver = match wanted.trim() {
                    "" | "(null)" => native,
                    name => Some(name),
                };
                let refused = self.refuses.get() == Some(text) && driver == Some(VFIO_PCI);
                if let Some(driver) = driver
                    && !refused
                    && !dir.join("driver").exists()
                    && self.tree.sysfs().driver_dir(driver).exists()
                {
                    self.tree.bind(text, driver);
                    // As vfio-pci and, in these tests, every other driver does.
                    let control = if driver == VFIO_PCI { "auto" } else { "on" };
                    fs::create_dir_all(dir.join("power"))?;
                    fs::write(dir.join("power/control"), control)?;
                }
            }
            other => panic!("write to {other}"),
        }
        Ok(())
    }

    fn modprobe(&self, module: &str) -> io::Result<()> {
        self.modules.borrow_mut().push(module.to_owned());
        if !self.loads {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.tree.add_driver(if module == VFIO_PCI { VFIO_PCI } else { "nouveau" });
        Ok(())
    }
}

fn tree() -> Tree {
    let tree = Tree::new();
    tree.add("0000:00:01.0", PORT, Some("pcieport"), Some(2));
    tree.add(AUDIO, NIC, Some("snd_hda_intel"), Some(2));
    tree.add(GPU, NIC, Some("nouveau"), Some(2));
    tree.add("0000:02:00.0", NIC, Some("nvme"), Some(3));
    tree
}

fn binder<'a>(tree: &'a Tree, kernel: &'a FakeKernel<'a>) -> Binder<&'a FakeKernel<'a>> {
    Binder::new(tree.sysfs(), tree.dev(), tree.root().join("proc"), kernel)
}

fn driver(tree: &Tree, bdf: &str) -> Option<String> {
    HostFunction::read(&tree.sysfs(), bdf.parse().unwrap()).unwrap().driver
}

fn bdf(text: &str) -> Bdf {
    text.parse().unwrap()
}

#[test]
fn the_whole_group_but_its_bridge_goes_to_vfio_and_comes_back() {
    let tree = tree();
    let kernel = FakeKernel::new(&tree);
    let binder = binder(&tree, &kernel);
    let report = binder.bind(bdf(GPU)).unwrap();
    assert_eq!(
        report.to_string(),
        "IOMMU group 2:\n  0000:00:01.0: pcieport (bridge, left alone)\n  0000:01:00.0: nouveau -> vfio-pci\n  \
         0000:01:00.1: snd_hda_intel -> vfio-pci"
    );
    assert_eq!(*kernel.modules.borrow(), [VFIO_PCI]);
    assert_eq!(driver(&tree, "0000:02:00.0").as_deref(), Some("nvme"));

    let report = binder.unbind(bdf(AUDIO)).unwrap();
    assert_eq!(driver(&tree, GPU).as_deref(), Some("nouveau"));
    assert_eq!(driver(&tree, AUDIO).as_deref(), Some("snd_hda_intel"));
    assert!(report.to_string().contains("0000:01:00.1: vfio-pci -> snd_hda_intel"), "{report}");
    let function = HostFunction::read(&tree.sysfs(), bdf(GPU)).unwrap();
    assert_eq!(function.driver_override, None);
}

#[test]
fn binding_twice_changes_nothing_more() {
    let tree = tree();
    let kernel = FakeKernel::new(&tree);
    binder(&tree, &kernel).bind(bdf(GPU)).unwrap();
    let report = binder(&tree, &kernel).bind(bdf(GPU)).unwrap();
    assert!(report.to_string().contains("0000:01:00.0: vfio-pci (unchanged)"), "{report}");
    assert_eq!(kernel.modules.borrow().len(), 1);
}

#[test]
fn a_failure_in_the_middle_gives_every_function_back() {
    let tree = tree();
    let kernel = FakeKernel::new(&tree);
    kernel.refuses.set(Some(AUDIO));
    let error = binder(&tree, &kernel).bind(bdf(GPU)).unwrap_err();
    assert!(error.to_string().contains("0000:01:00.1 was offered to vfio-pci"), "{error}");
    for (function, native) in [(GPU, "nouveau"), (AUDIO, "snd_hda_intel")] {
        let function = HostFunction::read(&tree.sysfs(), bdf(function)).unwrap();
        assert_eq!(function.driver.as_deref(), Some(native));
        assert_eq!(function.driver_override, None);
    }
}

#[test]
fn a_function_without_driver_is_bound_too() {
    let tree = tree();
    tree.unbind(GPU);
    let kernel = FakeKernel::new(&tree);
    let report = binder(&tree, &kernel).bind(bdf(GPU)).unwrap();
    assert!(report.to_string().contains("0000:01:00.0: no driver -> vfio-pci"), "{report}");
}

#[test]
fn the_native_module_is_loaded_when_nobody_has_it() {
    let tree = tree();
    let kernel = FakeKernel::new(&tree);
    binder(&tree, &kernel).bind(bdf(GPU)).unwrap();
    fs::remove_dir(tree.sysfs().driver_dir("nouveau")).unwrap();
    binder(&tree, &kernel).unbind(bdf(GPU)).unwrap();
    assert_eq!(driver(&tree, GPU).as_deref(), Some("nouveau"));
    assert!(kernel.modules.borrow().iter().any(|module| module.starts_with("pci:v00008086")));
}

#[test]
fn a_kernel_without_vfio_pci_is_reported_and_nothing_touched() {
    let tree = tree();
    let mut kernel = FakeKernel::new(&tree);
    kernel.loads = false;
    let error = binder(&tree, &kernel).bind(bdf(GPU)).unwrap_err();
    assert!(matches!(error, BindError::NoDriver(Some(_))), "{error}");
    assert_eq!(driver(&tree, GPU).as_deref(), Some("nouveau"));
}

#[test]
fn what_cannot_be_bound_is_refused_by_name() {
    let tree = tree();
    tree.add("0000:03:00.0", NIC, Some("igb"), None);
    let kernel = FakeKernel::new(&tree);
    let binder = binder(&tree, &kernel);
    assert!(matches!(
        binder.bind(bdf("0000:09:00.0")).unwrap_err(),
        BindError::Host(HostError::Absent { .. })
    ));
    assert!(matches!(binder.bind(bdf("0000:00:01.0")).unwrap_err(), BindError::Bridge { .. }));
    assert!(matches!(binder.bind(bdf("0000:03:00.0")).unwrap_err(), BindError::NoIommu { .. }));
    assert_eq!(driver(&tree, "0000:03:00.0").as_deref(), Some("igb"));
}

#[test]
fn a_refused_write_names_the_file_and_what_to_do() {
    #[derive(Debug)]
    struct ReadOnly;
    impl Kernel for ReadOnly {
        fn write(&self, _path: &Path, _text: &str) -> io::Result<()> {
            Err(io::ErrorKind::PermissionDenied.into())
        }
        fn modprobe(&self, _module: &str) -> io::Result<()> {
            Ok(())
        }
    }
    let tree = tree();
    tree.add_driver(VFIO_PCI);
    let error = Binder::new(tree.sysfs(), tree.dev(), tree.root().join("proc"), ReadOnly)
        .bind(bdf(GPU))
        .unwrap_err()
        .to_string();
    assert!(error.contains("driver_override") && error.contains("run as root"), "{error}");
    assert_eq!(driver(&tree, GPU).as_deref(), Some("nouveau"));
}

#[test]
fn a_disk_that_the_host_has_mounted_is_refused_without_force_and_left_alone() {
    let tree = tree();
    let kernel = FakeKernel::new(&tree);
    let disk = tree.dir(AUDIO).canonicalize().unwrap().join("block/sda");
    fs::create_dir_all(&disk).unwrap();
    fs::write(disk.join("dev"), "8:0\n").unwrap();
    fs::create_dir_all(tree.root().join("sys/class/block")).unwrap();
    std::os::unix::fs::symlink(&disk, tree.root().join("sys/class/block/sda")).unwrap();
    fs::create_dir_all(tree.root().join("proc/self")).unwrap();
    fs::write(tree.root().join("proc/self/mountinfo"), "30 1 8:0 / /home rw - ext4 /dev/sda rw\n").unwrap();
    let error = binder(&tree, &kernel).bind(bdf(GPU)).unwrap_err().to_string();
    for word in [AUDIO, "/dev/sda is mounted on '/home'", "--force"] {
        assert!(error.contains(word), "{error}");
    }
    assert_eq!(driver(&tree, GPU).as_deref(), Some("nouveau"), "nothing was touched");
    binder(&tree, &kernel).force(true).bind(bdf(GPU)).unwrap();
    assert_eq!(driver(&tree, AUDIO).as_deref(), Some(VFIO_PCI));
}

#[test]
fn a_loan_gives_back_driver_override_and_power_control() {
    let tree = tree();
    tree.unbind(AUDIO);
    for (function, control) in [(GPU, "auto"), (AUDIO, "auto")] {
        fs::create_dir_all(tree.dir(function).join("power")).unwrap();
        fs::write(tree.dir(function).join("power/control"), control).unwrap();
    }
    fs::write(tree.dir(GPU).join("driver_override"), "nouveau\n").unwrap();
    let kernel = FakeKernel::new(&tree);
    let binder = binder(&tree, &kernel);
    let loan = binder.lend(bdf(GPU)).unwrap();
    assert!(loan.is_needed());
    for function in [GPU, AUDIO] {
        assert_eq!(driver(&tree, function).as_deref(), Some(VFIO_PCI));
    }
    drop(loan);
    let gpu = HostFunction::read(&tree.sysfs(), bdf(GPU)).unwrap();
    assert_eq!((gpu.driver.as_deref(), gpu.driver_override.as_deref()), (Some("nouveau"), Some("nouveau")));
    // It had none, so it gets none, although the kernel would find one.
    assert_eq!(driver(&tree, AUDIO), None);
    for function in [GPU, AUDIO] {
        assert_eq!(fs::read_to_string(tree.dir(function).join("power/control")).unwrap(), "auto");
    }
}

#[test]
fn a_loan_of_what_vfio_has_already_changes_nothing() {
    let tree = tree();
    let kernel = FakeKernel::new(&tree);
    let binder = binder(&tree, &kernel);
    binder.bind(bdf(GPU)).unwrap();
    let loan = binder.lend(bdf(GPU)).unwrap();
    assert!(!loan.is_needed());
    drop(loan);
    assert_eq!(driver(&tree, GPU).as_deref(), Some(VFIO_PCI));
}

#[test]
fn a_loan_that_fails_in_the_middle_gives_back_power_control_too() {
    let tree = tree();
    for function in [GPU, AUDIO] {
        fs::create_dir_all(tree.dir(function).join("power")).unwrap();
        fs::write(tree.dir(function).join("power/control"), "auto").unwrap();
    }
    let kernel = FakeKernel::new(&tree);
    kernel.refuses.set(Some(AUDIO));
    assert!(binder(&tree, &kernel).lend(bdf(GPU)).is_err());
    assert_eq!(driver(&tree, GPU).as_deref(), Some("nouveau"));
    for function in [GPU, AUDIO] {
        assert_eq!(fs::read_to_string(tree.dir(function).join("power/control")).unwrap(), "auto");
    }
}
