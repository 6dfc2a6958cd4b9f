//! Dirty pages: exactly those written, by the guest and by the VMM, in both memory slots, and never forgotten.

mod core_support;

use checkpoint::PageBitmap;
use core_support::{between, booted, differing, memory_bytes, read, two_slots};
use vm_memory::{Bytes, GuestAddress};
use vmm::Vm;
use vmm::layout::HIGH_RAM_START;

// Waits for a number of passes in memory (at 0x200000). In each pass adds one to a word in every third page of 20 from
// 0x210000 and of 20 from 4 GiB + 64 KiB, then counts the pass (at 0x201000).
guest_code!(
    touch_start,
    touch_end,
    "movl $0x200000, %esi",
    "movl $0x201000, %edi",
    "movl $1, %ebp",
    "shlq $32, %rbp",
    "2: movq (%rsi), %rax",
    "cmpq (%rdi), %rax",
    "je 2b",
    "movl $0x210000, %ebx",
    "leaq 0x10000(%rbp), %rdx",
    "movl $20, %ecx",
    "3: incq (%rbx)",
    "incq 8(%rdx)",
    "addq $0x3000, %rbx",
    "addq $0x3000, %rdx",
    "decl %ecx",
    "jnz 3b",
    "incq (%rdi)",
    "jmp 2b",
);

fn touch() -> &'static [u8] {
    // SAFETY: the two labels of the block above.
    unsafe { between(&raw const touch_start, &raw const touch_end) }
}

/// Page frames one pass writes.
fn written() -> Vec<u64> {
    let low = (0..20).map(|i| (0x21_0000 + i * 0x3000) >> 12);
    let high = (0..20).map(|i| (HIGH_RAM_START + 0x1_0000 + i * 0x3000) >> 12);
    std::iter::once(0x201).chain(low).chain(high).collect()
}

/// Lets the guest do one pass and pauses it afterwards.
fn pass(vm: &Vm) {
    let wanted = read(vm, 0x20_0000) + 1;
    vm.memory()
        .write_obj(wanted, GuestAddress(0x20_0000))
        .unwrap();
    vm.resume();
    let begun = std::time::Instant::now();
    while read(vm, 0x20_1000) != wanted {
        assert!(
            begun.elapsed() < core_support::LONG,
            "the guest makes no pass"
        );
        assert!(vm.events().try_recv().is_err());
        std::thread::yield_now();
    }
    vm.pause().unwrap();
}

fn harvest(vm: &Vm) -> Vec<u64> {
    let mut pages = PageBitmap::new(vm.layout().ranges());
    vm.dirty().harvest(&mut pages).unwrap();
    pages.iter().collect()
}

fn with_command(mut pages: Vec<u64>) -> Vec<u64> {
    // The pass number is written by this process.
    pages.push(0x200);
    pages.sort_unstable();
    pages
}

#[test]
fn what_differs_is_dirty_and_only_what_was_written() {
    let (vm, _) = booted(1, &two_slots(), touch());
    pass(&vm);
    vm.dirty().start().unwrap();
    // What the first pass under the log writes besides (accessed bits in page tables) is not of interest.
    pass(&vm);
    harvest(&vm);
    for _ in 0..10 {
        let before = memory_bytes(vm.memory());
        pass(&vm);
        vm.capture().unwrap();
        let dirty = harvest(&vm);
        let after = memory_bytes(vm.memory());
        assert_eq!(differing(&before, &after), with_command(written()));
        assert_eq!(dirty, with_command(written()));
    }
}

#[test]
fn before_the_start_nothing_is_known_and_then_everything() {
    let (vm, _) = booted(1, &two_slots(), touch());
    vm.dirty().start().unwrap();
    assert!(harvest(&vm).is_empty());
    let before = memory_bytes(vm.memory());
    pass(&vm);
    let dirty = harvest(&vm);
    for page in differing(&before, &memory_bytes(vm.memory())) {
        assert!(dirty.contains(&page), "page {page:#x} changed unnoticed");
    }
    vm.dirty().stop().unwrap();
    pass(&vm);
    let mut none = PageBitmap::new(vm.layout().ranges());
    assert!(
        vm.dirty().harvest(&mut none).is_err(),
        "there is no log to read"
    );
}

#[test]
fn the_vmms_own_writes_count() {
    let (vm, _) = booted(1, &two_slots(), touch());
    vm.dirty().start().unwrap();
    let high = HIGH_RAM_START + 0x5000;
    vm.memory()
        .write_slice(&[1; 8192], GuestAddress(0x30_0800))
        .unwrap();
    vm.memory().write_obj(7u64, GuestAddress(high)).unwrap();
    assert_eq!(harvest(&vm), [0x300, 0x301, 0x302, high >> 12]);
    assert!(harvest(&vm).is_empty());
}

#[test]
fn a_look_forgets_nothing() {
    let (vm, _) = booted(1, &two_slots(), touch());
    vm.dirty().start().unwrap();
    pass(&vm);
    harvest(&vm);
    let look = || {
        let mut seen = PageBitmap::new(vm.layout().ranges());
        vm.dirty().peek(&mut seen).unwrap();
        seen.iter().collect::<Vec<u64>>()
    };
    assert!(look().is_empty());
    for _ in 0..3 {
        pass(&vm);
        assert_eq!(look(), with_command(written()));
        vm.memory()
            .write_obj(7u64, GuestAddress(0x30_0000))
            .unwrap();
        let mut all = with_command(written());
        all.push(0x300);
        all.sort_unstable();
        assert_eq!(look(), all, "what this process writes, too");
        pass(&vm);
        assert_eq!(look(), all, "written again, and still known");
        assert_eq!(harvest(&vm), all);
        assert!(look().is_empty());
        assert!(harvest(&vm).is_empty());
    }
}

#[test]
fn hot_pages_are_reported_until_they_are_not_hot() {
    let (vm, _) = booted(1, &two_slots(), touch());
    vm.dirty().start().unwrap();
    pass(&vm);
    harvest(&vm);
    let mut hot = PageBitmap::new(vm.layout().ranges());
    for page in written().into_iter().skip(1).step_by(2) {
        hot.set(page);
    }
    let none = PageBitmap::new(vm.layout().ranges());
    let harvest_but = |hot: &PageBitmap| {
        let mut pages = PageBitmap::new(vm.layout().ranges());
        vm.dirty().harvest_but(&mut pages, hot).unwrap();
        pages.iter().collect::<Vec<u64>>()
    };
    assert!(harvest_but(&hot).is_empty(), "hot, but never written");
    for _ in 0..3 {
        pass(&vm);
        assert_eq!(harvest_but(&hot), with_command(written()));
        let mut still = PageBitmap::new(vm.layout().ranges());
        vm.dirty().peek(&mut still).unwrap();
        // Where KVM protects all that it reports, nothing stays writable.
        if !still.is_empty() {
            assert_eq!(still, hot);
            assert_eq!(harvest_but(&hot), hot.iter().collect::<Vec<u64>>());
        }
    }
    let left = harvest_but(&none);
    assert!(left.is_empty() || left == hot.iter().collect::<Vec<u64>>());
    assert!(harvest_but(&none).is_empty());
    let before = memory_bytes(vm.memory());
    pass(&vm);
    let dirty = harvest_but(&none);
    assert_eq!(dirty, with_command(written()), "noticed again");
    assert_eq!(differing(&before, &memory_bytes(vm.memory())), dirty);
}

#[test]
fn a_failed_checkpoints_pages_come_back() {
    let (vm, _) = booted(1, &two_slots(), touch());
    vm.dirty().start().unwrap();
    pass(&vm);
    harvest(&vm);
    pass(&vm);
    let mut failed = PageBitmap::new(vm.layout().ranges());
    vm.dirty().harvest(&mut failed).unwrap();
    vm.dirty().merge_back(&failed);
    vm.memory()
        .write_obj(7u64, GuestAddress(0x30_0000))
        .unwrap();
    let mut expected: Vec<u64> = failed.iter().chain([0x300]).collect();
    expected.sort_unstable();
    assert_eq!(harvest(&vm), expected);
    assert!(harvest(&vm).is_empty());
    // Given back twice is still reported once, and a new start forgets it.
    vm.dirty().merge_back(&failed);
    vm.dirty().merge_back(&failed);
    assert_eq!(harvest(&vm), failed.iter().collect::<Vec<_>>());
    vm.dirty().merge_back(&failed);
    vm.dirty().start().unwrap();
    assert!(harvest(&vm).is_empty());
}
