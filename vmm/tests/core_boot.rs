//! What is said about a kernel, initrd, command line or shape that cannot be booted, and what a guest finds at its entry.

mod core_support;

use core_support::{between, elf, machine, two_slots};
use vm_memory::{Bytes, GuestAddress};
use vmm::{BootError, BootFile, BootSpec, KernelSource, RamFiles, RamLayout, Vm, VmError, VmSpec};

guest_code!(
    look_start,
    look_end,
    // The RSDP's address and the command line's first bytes, sent down the serial line; then off.
    "movl $0x3f8, %edx",
    "movq 0x70(%rsi), %rbx",
    "movb (%rbx), %al",
    "outb %al, %dx",
    "movb 1(%rbx), %al",
    "outb %al, %dx",
    "movl 0x228(%rsi), %ebx",
    "movb (%rbx), %al",
    "outb %al, %dx",
    "movb 1(%rbx), %al",
    "outb %al, %dx",
    // A stack there is, and memory above 4 GiB is mapped.
    "pushq %rbx",
    "popq %rcx",
    "cmpq %rbx, %rcx",
    "jne 2f",
    "movl $1, %ebx",
    "shlq $32, %rbx",
    "movq %rcx, (%rbx)",
    "movb $33, %al",
    "outb %al, %dx",
    "2: movl $0x604, %edx",
    "movl $0x3400, %eax",
    "outw %ax, %dx",
    "jmp 2b",
);

fn look() -> Vec<u8> {
    // SAFETY: the two labels of the block above.
    elf(unsafe { between(&raw const look_start, &raw const look_end) })
}

fn fresh() -> Vm {
    let layout = two_slots();
    machine(1, &layout, RamFiles::create(&layout).unwrap()).0
}

fn boot(kernel: Vec<u8>) -> Result<(), BootError> {
    boot_spec(&BootSpec {
        kernel: KernelSource::Bytes(kernel),
        initrd: None,
        cmdline: String::new(),
    })
}

fn boot_spec(spec: &BootSpec) -> Result<(), BootError> {
    fresh().boot(spec)
}

#[test]
fn an_elf_guest_finds_what_the_boot_protocol_promises() {
    let layout = two_slots();
    let (vm, line) = machine(1, &layout, RamFiles::create(&layout).unwrap());
    vm.boot(&BootSpec {
        kernel: KernelSource::Bytes(look()),
        initrd: None,
        cmdline: "xy z".to_owned(),
    })
    .unwrap();
    vm.resume();
    assert_eq!(
        vm.events().recv_timeout(core_support::LONG),
        Ok(vmm::VmEvent::Shutdown)
    );
    assert_eq!(line.bytes(), b"RSxy!");
}

#[test]
fn the_first_processor_is_told_of_all_memory() {
    let layout = two_slots();
    let (vm, _) = machine(1, &layout, RamFiles::create(&layout).unwrap());
    vm.boot(&BootSpec {
        kernel: KernelSource::Bytes(look()),
        initrd: None,
        cmdline: String::new(),
    })
    .unwrap();
    let count: u8 = vm
        .memory()
        .read_obj(GuestAddress(vmm::layout::ZERO_PAGE + 0x1e8))
        .unwrap();
    let mut usable = 0;
    for index in 0..u64::from(count) {
        let at = vmm::layout::ZERO_PAGE + 0x2d0 + index * 20;
        let size: u64 = vm.memory().read_obj(GuestAddress(at + 8)).unwrap();
        let kind: u32 = vm.memory().read_obj(GuestAddress(at + 16)).unwrap();
        usable += if kind == 1 { size } else { 0 };
    }
    assert_eq!(usable, (8 << 20) - ((1 << 20) - vmm::layout::EBDA));
}

#[test]
fn bad_kernels_are_named() {
    for bad in [
        Vec::new(),
        b"#!/bin/sh".to_vec(),
        vec![0; 4096],
        b"\x7fELF".to_vec(),
    ] {
        let error = boot(bad).unwrap_err();
        assert!(matches!(error, BootError::NotAKernel { .. }), "{error}");
    }
    let spoil = |at: usize, value: u8| {
        let mut kernel = look();
        kernel[at] = value;
        boot(kernel).unwrap_err().to_string()
    };
    assert!(spoil(4, 1).contains("not for 64-bit x86"));
    assert!(spoil(18, 3).contains("not for 64-bit x86"));
    assert!(spoil(26, 0).contains("entry point"));
    assert!(spoil(64 + 26, 0).contains("below 1 MiB"));
    assert!(spoil(64 + 44, 1).contains("memory is too small"));
    assert!(spoil(64 + 36, 1).contains("larger in the file"));
    let mut cut = look();
    cut.truncate(100);
    assert!(boot(cut).unwrap_err().to_string().contains("cut short"));
    let mut cut = look();
    cut.truncate(130);
    assert!(matches!(boot(cut), Err(BootError::NotAKernel { .. })));
}

#[test]
fn any_spoilt_header_byte_is_an_error_or_boots_but_never_panics() {
    // One machine for all: it never runs.
    let vm = fresh();
    let boot = |kernel: Vec<u8>| {
        vm.boot(&BootSpec {
            kernel: KernelSource::Bytes(kernel),
            initrd: None,
            cmdline: String::new(),
        })
    };
    let kernel = look();
    for at in 0..120 {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut spoilt = kernel.clone();
            spoilt[at] = value;
            let _ = boot(spoilt);
        }
    }
    // A bzImage header over nothing, with every byte of it spoilt.
    let mut image = vec![0; 0x4000];
    image[0x1f1] = 4;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    image[0x236] = 1;
    image[0x238..0x23c].copy_from_slice(&255u32.to_le_bytes());
    boot(image.clone()).unwrap();
    for at in 0x1f1..0x270 {
        for value in [0, 1, 0x7f, 0xff] {
            let mut spoilt = image.clone();
            spoilt[at] = value;
            let _ = boot(spoilt);
        }
    }
    let mut sixteen = image.clone();
    sixteen[0x236] = 0;
    assert!(
        boot(sixteen)
            .unwrap_err()
            .to_string()
            .contains("no 64-bit entry point")
    );
    let mut huge = image;
    huge[0x260..0x264].copy_from_slice(&0x1000_0000u32.to_le_bytes());
    assert!(matches!(boot(huge), Err(BootError::MemoryTooSmall { .. })));
}

#[test]
fn a_file_that_is_not_the_one_meant_is_not_booted() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        BootFile {
            path,
            blake3: Some(*blake3::hash(content).as_bytes()),
        }
    };
    let (kernel, initrd) = (file("kernel", &look()), file("initrd", &[7; 5000]));
    let spec = BootSpec {
        kernel: KernelSource::File(kernel.clone()),
        initrd: Some(initrd.clone()),
        cmdline: String::new(),
    };
    boot_spec(&spec).unwrap();
    std::fs::write(&initrd.path, [8; 5000]).unwrap();
    let changed = boot_spec(&spec).unwrap_err();
    assert!(matches!(changed, BootError::Changed { what: "initrd", .. }));
    assert!(changed.to_string().contains("initrd"), "{changed}");
    std::fs::write(&kernel.path, elf(&[0xf4])).unwrap();
    assert!(matches!(
        boot_spec(&spec),
        Err(BootError::Changed { what: "kernel", .. })
    ));
}

#[test]
fn files_and_command_lines_have_limits() {
    let spec = |kernel: &str| BootSpec {
        kernel: KernelSource::File(kernel.into()),
        initrd: None,
        cmdline: String::new(),
    };
    let missing = boot_spec(&spec("/no/such/vmlinuz"))
        .unwrap_err()
        .to_string();
    assert!(missing.contains("/no/such/vmlinuz"), "{missing}");
    assert!(matches!(
        boot_spec(&spec("/")),
        Err(BootError::File { what: "kernel", .. })
    ));

    let with = |initrd: Option<&std::path::Path>, cmdline: String| {
        boot_spec(&BootSpec {
            kernel: KernelSource::Bytes(look()),
            initrd: initrd.map(Into::into),
            cmdline,
        })
    };
    let missing = with(Some("/no/such/initrd".as_ref()), String::new())
        .unwrap_err()
        .to_string();
    assert!(missing.contains("/no/such/initrd"), "{missing}");
    let big = tempfile::NamedTempFile::new().unwrap();
    big.as_file().set_len(5 << 20).unwrap();
    assert!(matches!(
        with(Some(big.path()), String::new()),
        Err(BootError::InitrdTooBig {
            bytes: 0x50_0000,
            ..
        })
    ));
    big.as_file().set_len(2 << 20).unwrap();
    with(Some(big.path()), String::new()).unwrap();

    with(None, "x".repeat(2047)).unwrap();
    assert!(matches!(
        with(None, "x".repeat(2048)),
        Err(BootError::CmdlineTooLong {
            len: 2048,
            limit: 2047
        })
    ));
    assert!(matches!(
        with(None, "a\0b".to_owned()),
        Err(BootError::CmdlineNul)
    ));
}

#[test]
fn shapes_have_limits() {
    let layout = two_slots();
    for vcpus in [0, 9, 255] {
        let spec = VmSpec {
            cpu: Default::default(),
            vcpus,
            ram: layout.clone(),
            net: Vec::new(),
            disks: Vec::new(),
            rng: false,
            serial_out: Box::new(std::io::sink()),
            serial_in: None,
        };
        let error = Vm::new(spec, RamFiles::create(&layout).unwrap())
            .err()
            .expect("such a machine cannot be had");
        assert!(matches!(error, VmError::VcpuCount(n) if n == vcpus));
    }
    let (vm, _) = machine(8, &layout, RamFiles::create(&layout).unwrap());
    assert_eq!(vm.vcpus(), 8);
    assert_eq!(vm.capture().unwrap().vcpus.len(), 8);
    let small = RamLayout::new(4 << 20, None).unwrap();
    let spec = VmSpec {
        cpu: Default::default(),
        vcpus: 1,
        ram: layout,
        net: Vec::new(),
        disks: Vec::new(),
        rng: false,
        serial_out: Box::new(std::io::sink()),
        serial_in: None,
    };
    assert!(matches!(
        Vm::new(spec, RamFiles::create(&small).unwrap()),
        Err(VmError::Memory(_))
    ));
}
