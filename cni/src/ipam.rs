//! Delegation to an IPAM plugin (CNI specification, section 4).

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde::Deserialize;

use crate::error::{CniError, Code};
use crate::netconf::{Environment, NetConf};
use crate::result::CniResult;

/// An IPAM plugin, found.
#[derive(Debug)]
pub(crate) struct IpamPlugin<'a> {
    program: PathBuf,
    conf: &'a NetConf,
}

#[derive(Debug, Deserialize)]
struct PluginError {
    code: u32,
    msg: String,
    #[serde(default)]
    details: String,
}

impl<'a> IpamPlugin<'a> {
    /// The plugin that the configuration delegates to, if it does.
    pub(crate) fn find(conf: &'a NetConf, environment: &Environment) -> Result<Option<IpamPlugin<'a>>, CniError> {
        let Some(name) = conf.ipam_plugin() else { return Ok(None) };
        if name.contains('/') {
            return Err(CniError::new(
                Code::InvalidConfig,
                format!("ipam.type: \"{name}\" is no plugin's name: write it without a path"),
            ));
        }
        let program = environment.path.iter().map(|directory| directory.join(name)).find(|path| path.is_file());
        let program = program.ok_or_else(|| {
            CniError::new(
                Code::InvalidConfig,
                format!("ipam.type: no plugin \"{name}\" in CNI_PATH: install it there, or leave ipam out for the built-in one"),
            )
        })?;
        Ok(Some(IpamPlugin { program, conf }))
    }

    /// Takes addresses.
    pub(crate) fn add(&self) -> Result<CniResult, CniError> {
        let output = self.run("ADD")?;
        serde_json::from_slice(&output).map_err(|error| self.failed(Code::Decode, format!("gave no result: {error}")))
    }

    /// DEL, CHECK, STATUS or GC: nothing comes back.
    pub(crate) fn call(&self, command: &str) -> Result<(), CniError> {
        self.run(command).map(drop)
    }

    fn run(&self, command: &str) -> Result<Vec<u8>, CniError> {
        let io = |error: std::io::Error| self.failed(Code::Io, error.to_string());
        let mut child = Command::new(&self.program)
            .env("CNI_COMMAND", command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(io)?;
        if let Some(mut stdin) = child.stdin.take() {
            // A plugin that ends without reading has its own reason, which it prints.
            let _ = stdin.write_all(&self.conf.raw);
        }
        let output = child.wait_with_output().map_err(io)?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        match serde_json::from_slice::<PluginError>(&output.stdout) {
            Ok(PluginError { code, msg, details }) => {
                Err(CniError { code, msg: format!("{} {command}: {msg}", self.program.display()), details })
            }
            Err(_) => Err(self.failed(Code::Io, format!("{command} failed ({}) and did not say why", output.status))),
        }
    }

    fn failed(&self, code: Code, what: String) -> CniError {
        CniError::new(code, format!("IPAM plugin {}: {what}", self.program.display()))
    }
}
