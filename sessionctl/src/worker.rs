//! The hidden subcommand: this program as a worker of its own measurements and cases, in a process of its own.
//!
//! What it works on comes on stdin or in the environment, because it may hold an id or a password, and a command line is for
//! everybody to read.

use std::process::Command;

use conformance_tests::processes;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::args::Part;
use crate::bench::wait_for_handovers;
use crate::check::SharedHarness;
use crate::failure::Failure;
use crate::hammer::take_part;

/// Returns how to start this program as a worker.
pub(crate) fn command(part: Part) -> Result<Command, Failure> {
    let mut command = Command::new(std::env::current_exe().map_err(Failure::local("find this program"))?);
    command.args(part.words());
    Ok(command)
}

pub(crate) async fn worker(part: Part) -> Result<(), Failure> {
    match part {
        Part::Case => processes::worker(&SharedHarness::from_environment()?).await,
        Part::Handover => wait_for_handovers(BufReader::new(tokio::io::stdin()).lines()).await?,
        Part::Hammer => take_part().await?,
    }
    Ok(())
}
