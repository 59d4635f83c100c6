//! vswitch-cni: the CNI plugin. It makes the pod's veth, plugs it in over the daemon's socket and prints the result.
//!
//! CNI specification 1.1.0 (containernetworking/cni, SPEC.md), results of 0.4.0 and 1.0.0 too.
#![forbid(unsafe_code)]

mod commands;
mod error;
mod ipam;
mod netconf;
mod result;

use std::env;
use std::io::{self, Read};
use std::process::ExitCode;

use serde_json::json;

use crate::error::{CniError, Code};
use crate::netconf::NetConf;
use crate::result::Version;

/// More than any configuration is long.
const MAX_INPUT_BYTES: u64 = 4 << 20;

fn main() -> ExitCode {
    let Ok(command) = env::var("CNI_COMMAND") else {
        eprintln!("vswitch-cni {}: a CNI plugin, called by a container runtime.", env!("CARGO_PKG_VERSION"));
        eprintln!("CNI versions: {}. Set CNI_COMMAND to try it by hand.", Version::list());
        return ExitCode::from(1);
    };
    let mut version = String::new();
    match run(&command, &mut version) {
        Ok(output) => {
            print!("{output}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let mut object = json!(error);
            object["cniVersion"] = json!(if version.is_empty() { Version::V1_1_0.name() } else { &version });
            println!("{object}");
            ExitCode::from(1)
        }
    }
}

/// Carries the command out; what it prints. `version` is set once it is known, for the error object.
fn run(command: &str, version: &mut String) -> Result<String, CniError> {
    let mut input = Vec::new();
    io::stdin()
        .take(MAX_INPUT_BYTES)
        .read_to_end(&mut input)
        .map_err(|error| CniError::new(Code::Io, format!("cannot read the network configuration: {error}")))?;
    if command == "VERSION" {
        return Ok(format!("{}\n", supported(&input)));
    }
    let conf = NetConf::parse(input)?;
    version.clone_from(&conf.cni_version);
    let asked = conf.version()?;
    let needs = match command {
        "STATUS" | "GC" => Version::V1_1_0,
        _ => Version::V0_4_0,
    };
    if asked < needs {
        let msg = format!("{command} came with CNI {}; the configuration says {}", needs.name(), asked.name());
        return Err(CniError::new(Code::IncompatibleVersion, msg));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CniError::new(Code::Io, error.to_string()))?;
    runtime.block_on(async {
        match command {
            "ADD" => {
                let result = commands::add(&conf).await?.into_version(asked);
                Ok(format!("{}\n", json!(result)))
            }
            "DEL" => commands::del(&conf).await.map(|()| String::new()),
            "CHECK" => commands::check(&conf).await.map(|()| String::new()),
            "STATUS" => commands::status(&conf).map(|()| String::new()),
            "GC" => commands::gc(&conf).await.map(|()| String::new()),
            other => {
                let msg = format!("CNI_COMMAND \"{other}\" is unknown: ADD, DEL, CHECK, GC, STATUS or VERSION");
                Err(CniError::new(Code::InvalidEnvironment, msg))
            }
        }
    })
}

/// The answer to VERSION, in the version of the question.
fn supported(input: &[u8]) -> serde_json::Value {
    let asked: serde_json::Value = serde_json::from_slice(input).unwrap_or_default();
    let version = asked["cniVersion"].as_str().unwrap_or(Version::V1_1_0.name());
    json!({ "cniVersion": version, "supportedVersions": Version::ALL.map(Version::name) })
}
