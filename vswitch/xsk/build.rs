//! Compiles the XDP programs.

mod clang;

fn main() {
    clang::compile_all(&["switch"], "bpf");
}
