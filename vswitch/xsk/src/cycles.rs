//! The processor's own clock, made safe: what a stage costs is told in its ticks, which take no system call to read.

/// Ticks since some moment, at a rate that does not change while the machine runs: the time stamp counter of x86-64, the virtual
/// counter of AArch64. Always 0 elsewhere.
#[inline(always)]
pub fn cycles() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction reads a register and touches no memory; Linux lets every process use it.
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
    #[cfg(target_arch = "aarch64")]
    {
        let ticks: u64;
        // SAFETY: reads a register that Linux lets every process read.
        unsafe { core::arch::asm!("mrs {}, cntvct_el0", out(reg) ticks, options(nomem, nostack)) };
        ticks
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    0
}
