//! Names of PCI device classes (PCI Code and ID Assignment Specification 1.14, section 1), for people.

/// The name of a class code: base class in bits 23:16, subclass in bits 15:8.
pub fn name(class: u32) -> &'static str {
    match class >> 8 & 0xffff {
        0x0100 => "SCSI controller",
        0x0101 => "IDE controller",
        0x0104 => "RAID controller",
        0x0106 => "SATA controller",
        0x0107 => "SAS controller",
        0x0108 => "NVMe drive",
        0x0200 => "Ethernet controller",
        0x0207 => "InfiniBand controller",
        0x0280 => "network controller",
        0x0300 => "VGA controller",
        0x0302 => "3D controller",
        0x0380 => "display controller",
        0x0401 => "audio device",
        0x0403 => "HD audio device",
        0x0480 => "multimedia device",
        0x0600 => "host bridge",
        0x0601 => "ISA bridge",
        0x0604 => "PCI bridge",
        0x0700 => "serial port",
        0x0780 => "communication device",
        0x0805 => "SD host controller",
        0x0806 => "IOMMU",
        0x0880 => "system device",
        0x0c03 => "USB controller",
        0x0c05 => "SMBus controller",
        0x0c80 => "serial bus controller",
        0x0d11 => "Bluetooth controller",
        0x0d80 => "wireless controller",
        0x1000 => "encryption controller",
        0x1080 => "encryption controller",
        0x1180 => "signal processor",
        0x1200 => "processing accelerator",
        _ => base(class >> 16),
    }
}

fn base(class: u32) -> &'static str {
    match class {
        0x01 => "storage controller",
        0x02 => "network controller",
        0x03 => "display controller",
        0x04 => "multimedia device",
        0x05 => "memory controller",
        0x06 => "bridge",
        0x07 => "communication device",
        0x08 => "system device",
        0x09 => "input device",
        0x0a => "docking station",
        0x0b => "processor",
        0x0c => "serial bus controller",
        0x0d => "wireless controller",
        0x0f => "satellite controller",
        0x10 => "encryption controller",
        0x11 => "signal processor",
        0x12 => "processing accelerator",
        _ => "unclassified device",
    }
}

#[cfg(test)]
mod tests {
    use super::name;

    #[test]
    fn a_known_subclass_has_its_own_name_and_another_that_of_its_base() {
        assert_eq!(name(0x03_02_00), "3D controller");
        assert_eq!(name(0x03_7f_00), "display controller");
        assert_eq!(name(0xff_00_00), "unclassified device");
    }
}
