//! The ACPI tables of a machine: RSDP, XSDT, FADT, FACS, MADT and a DSDT naming its devices (ACPI 6.5, chapter 5).
//!
//! Stock cloud kernels find virtio-mmio devices and further processors only here.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use thiserror::Error;

use crate::devices::MmioSlot;
use crate::layout::{
    ACPI, ACPI_END, IOAPIC, LOCAL_APIC, PM1_CONTROL_PORT, PM1_EVENT_PORT, RESET_PORT,
    S5_SLEEP_TYPE, SCI_GSI,
};

const OEM: [u8; 6] = *b"UNDSTD";
const OEM_TABLE: [u8; 8] = *b"UNDSTUDY";
/// FADT `IAPC_BOOT_ARCH`: ISA devices are present; there is no VGA. (No 8042 bit: no keyboard is probed for.)
const BOOT_ARCH: u16 = 1 | 1 << 2;
/// MADT flag: there are also two 8259 controllers.
const PCAT_COMPAT: u32 = 1;

/// The tables do not fit into their place.
#[derive(Debug, Error)]
#[error("ACPI tables of {0} bytes do not fit into the {room} bytes they have", room = ACPI_END - ACPI)]
pub struct AcpiError(usize);

/// The bytes to be put at [`ACPI`], the RSDP first, for a machine of `vcpus` with virtio devices at `slots`.
///
/// # Errors
/// [`AcpiError`] if there are too many devices for the space.
pub(crate) fn tables(vcpus: u8, slots: &[MmioSlot]) -> Result<Vec<u8>, AcpiError> {
    let mut image = Image(Vec::new());
    // The RSDP comes first but holds an address known last.
    image.0.resize(Rsdp::len(), 0);
    let dsdt = image.place(&dsdt(slots), 16);
    let facs = image.place(&FACS::new(), 64);
    let fadt = image.place(&fadt(dsdt, facs), 16);
    let madt = image.place(&madt(vcpus), 16);
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = image.place(&xsdt, 16);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    image.0[..rsdp.len()].copy_from_slice(&rsdp);
    if image.0.len() as u64 > ACPI_END - ACPI {
        return Err(AcpiError(image.0.len()));
    }
    Ok(image.0)
}

struct Image(Vec<u8>);

impl Image {
    fn place(&mut self, table: &dyn Aml, align: usize) -> u64 {
        self.0.resize(self.0.len().next_multiple_of(align), 0);
        let at = ACPI + self.0.len() as u64;
        table.to_aml_bytes(&mut self.0);
        at
    }
}

fn io(port: u16, bytes: u8, access: AccessSize) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        bytes * 8,
        0,
        access,
        u64::from(port),
    )
}

fn fadt(dsdt: u64, facs: u64) -> impl Aml {
    // Without the flag PWR_BUTTON: the button is that of the PM1 registers.
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, 1)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    // Both forms of each address: kernels differ in which they trust.
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.sci_int = u16::from(SCI_GSI).into();
    fadt.pm1a_evt_blk = u32::from(PM1_EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = io(PM1_EVENT_PORT, 4, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(PM1_CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = io(PM1_CONTROL_PORT, 2, AccessSize::WordAccess);
    // No C2 or C3.
    fadt.p_lvl2_lat = 0x0FFF.into();
    fadt.p_lvl3_lat = 0x0FFF.into();
    fadt.century = 0x32;
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = io(RESET_PORT, 1, AccessSize::ByteAccess);
    fadt.reset_value = 0xFE;
    fadt.finalize()
}

fn madt(vcpus: u8) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", 44, 3, OEM, OEM_TABLE, 1);
    madt.write_u32(36, LOCAL_APIC);
    madt.write_u32(40, PCAT_COMPAT);
    for id in 0..vcpus {
        // Processor local APIC: type 0, 8 bytes, uid, APIC id, flags (1: enabled).
        madt.append_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    // I/O APIC: type 1, 12 bytes, id, reserved, address, first GSI.
    let address = IOAPIC.to_le_bytes();
    madt.append_slice(&[
        1, 12, vcpus, 0, address[0], address[1], address[2], address[3], 0, 0, 0, 0,
    ]);
    // The SCI is level-triggered, active high (flags 0xD). Others keep their ISA numbers: KVM's interrupt routing is
    // one to one, the timer's included.
    madt.append_slice(&[2, 10, 0, SCI_GSI, SCI_GSI, 0, 0, 0, 0x0D, 0]);
    // LINT1 of every processor is NMI.
    madt.append_slice(&[4, 6, 0xFF, 0, 0, 1]);
    madt.update_checksum();
    madt
}

fn dsdt(slots: &[MmioSlot]) -> Sdt {
    let mut aml = Vec::new();
    for (index, slot) in slots.iter().enumerate() {
        virtio(index, slot, &mut aml);
    }
    let (com1, com1_io, com1_irq) = (
        EISAName::new("PNP0501"),
        IO::new(0x3F8, 0x3F8, 0, 8),
        isa_irq(4),
    );
    legacy("COM1", &com1, &[&com1_io, &com1_irq], &mut aml);
    let (rtc, rtc_io, rtc_irq) = (
        EISAName::new("PNP0B00"),
        IO::new(0x70, 0x70, 0, 2),
        isa_irq(8),
    );
    legacy("RTC_", &rtc, &[&rtc_io, &rtc_irq], &mut aml);
    // Which sleep type switches the machine off.
    let (s5, zero) = (S5_SLEEP_TYPE, 0u8);
    Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&s5, &s5, &zero, &zero]),
    )
    .to_aml_bytes(&mut aml);

    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, 1);
    dsdt.append_slice(&aml);
    dsdt
}

fn isa_irq(number: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, number)
}

fn virtio(index: usize, slot: &MmioSlot, aml: &mut dyn AmlSink) {
    let id = index as u8;
    // Edge-triggered, active high, exclusive.
    let interrupt = Interrupt::new(true, true, false, false, slot.gsi);
    // The bus lies below 4 GiB (`layout`).
    let memory = Memory32Fixed::new(true, slot.addr as u32, slot.len as u32);
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new(&format!("VR{index:02X}")),
            vec![
                &Name::new(Path::new("_HID"), &"LNRO0005"),
                &Name::new(Path::new("_UID"), &id),
                // Reads and writes of the device are coherent with the caches.
                &Name::new(Path::new("_CCA"), &1u8),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&memory, &interrupt]),
                ),
            ],
        )],
    )
    .to_aml_bytes(aml);
}

fn legacy(name: &str, hid: &dyn Aml, resources: &[&dyn Aml], aml: &mut dyn AmlSink) {
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new(name),
            vec![
                &Name::new(Path::new("_HID"), hid),
                &Name::new(Path::new("_UID"), &0u8),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(resources.to_vec()),
                ),
            ],
        )],
    )
    .to_aml_bytes(aml);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
    }

    fn u32_at(image: &[u8], at: usize) -> usize {
        u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize
    }

    fn u64_at(image: &[u8], at: usize) -> usize {
        u64::from_le_bytes(image[at..at + 8].try_into().unwrap()) as usize
    }

    fn table<'a>(image: &'a [u8], address: usize, signature: &[u8; 4]) -> &'a [u8] {
        let at = address - ACPI as usize;
        let table = &image[at..at + u32_at(image, at + 4)];
        assert_eq!(&table[..4], signature);
        table
    }

    #[test]
    fn every_table_is_reached_and_sums_to_zero() {
        let slots: Vec<MmioSlot> = (0..8)
            .map(|i| MmioSlot {
                addr: 0xD000_0000 + u64::from(i) * 0x1000,
                len: 0x1000,
                gsi: 16 + i,
            })
            .collect();
        let image = tables(8, &slots).unwrap();
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!((sum(&image[..20]), sum(&image[..36])), (0, 0));
        let xsdt = table(&image, u64_at(&image, 24), b"XSDT");
        let fadt = table(&image, u64_at(xsdt, 36), b"FACP");
        let madt = table(&image, u64_at(xsdt, 44), b"APIC");
        let dsdt = table(&image, u64_at(fadt, 140), b"DSDT");
        assert_eq!(u64_at(fadt, 140), u32_at(fadt, 40));
        for each in [xsdt, fadt, madt, dsdt] {
            assert_eq!(sum(each), 0, "{:?}", std::str::from_utf8(&each[..4]));
        }
        let facs = u32_at(fadt, 36);
        assert_eq!(facs % 64, 0);
        assert_eq!(&image[facs - ACPI as usize..][..4], b"FACS");
        let hids = dsdt.windows(8).filter(|w| w == b"LNRO0005").count();
        assert_eq!(hids, 8);
        // Length and number of the structures after the header of 44 bytes.
        let (mut at, mut kinds) = (44, Vec::new());
        while at < madt.len() {
            kinds.push(madt[at]);
            at += usize::from(madt[at + 1]);
        }
        assert_eq!(kinds, [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4]);
        assert_eq!(at, madt.len());
    }

    #[test]
    fn a_machine_without_devices_has_tables_too() {
        let image = tables(1, &[]).unwrap();
        assert!(!image.windows(8).any(|w| w == b"LNRO0005"));
    }
}
