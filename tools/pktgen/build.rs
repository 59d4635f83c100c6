//! Compiles the XDP programs.

#[path = "../../vswitch/xsk/clang.rs"]
mod clang;

fn main() {
    clang::compile_all(&["generate", "count", "redirect"], "../../vswitch/xsk/bpf");
}
