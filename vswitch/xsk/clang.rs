//! Compiles XDP programs with clang, for build scripts. No other tool, no header but the kernel's own.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

const REMEDY: &str = "install clang (Debian: apt-get install clang, or run `cargo xtask setup`) or name one in CLANG";

/// Compiles `bpf/NAME.c` of the crate into `OUT_DIR/NAME.o`, each with `include` beside its own headers.
pub(crate) fn compile_all(names: &[&str], include: &str) {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-changed={include}");
    println!("cargo::rerun-if-env-changed=CLANG");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    for name in names {
        compile(&clang, name, include, &Path::new(&out).join(format!("{name}.o")));
    }
}

fn compile(clang: &str, name: &str, include: &str, object: &Path) {
    let mut command = Command::new(clang);
    command.args(["-target", "bpf", "-O2", "-g", "-Wall", "-Werror", "-fno-stack-protector", "-I", include]);
    // A program does not use every helper of the header.
    command.arg("-Wno-unused-variable");
    // Debian keeps asm/types.h under the architecture's triplet, where `-target bpf` does not look.
    let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let triplet = format!("/usr/include/{arch}-linux-gnu");
    if fs::exists(&triplet).unwrap_or(false) {
        command.args(["-idirafter", &triplet]);
    }
    command.arg("-c").arg(format!("bpf/{name}.c")).arg("-o").arg(object);
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{clang} could not compile bpf/{name}.c ({status}): its messages are above; {REMEDY}"),
        Err(error) => panic!("cannot run {clang}: {error}; {REMEDY}"),
    }
}
