//! Tools: what a machine must have besides Rust, and how it gets there.
//!
//! Nothing here knows what a tool is used for beyond the reason it prints.

use std::path::Path;

use crate::step::{Failure, Steps, cargo, command};

/// A program that tests start, and the Debian package that has it.
#[derive(Debug)]
struct Program {
    name: &'static str,
    package: &'static str,
    reason: &'static str,
}

/// Every program that the tests start. A backend whose suite needs a server adds its line here, and nowhere else.
const PROGRAMS: &[Program] = &[Program { name: "sh", package: "dash", reason: "the tests of xtask start it" }];

/// Installs the packages of the programs that are missing, if any.
pub(crate) fn install_debian_packages(steps: &mut Steps) -> Result<(), Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian keeps servers where only root looks.
    let mut places: Vec<_> = std::env::split_paths(&path).collect();
    places.extend(["/usr/sbin", "/usr/local/sbin", "/sbin"].map(Into::into));
    let found = |name: &str| places.iter().any(|place| place.join(name).is_file());
    let missing = missing(PROGRAMS, found);
    if missing.is_empty() {
        return Ok(());
    }
    let root = std::fs::metadata("/proc/self").is_ok_and(|this| std::os::unix::fs::MetadataExt::uid(&this) == 0);
    let become_root = if root || !Path::new("/usr/bin/sudo").exists() { "" } else { "sudo -n " };
    let apt = |words: &str| {
        let apt = command(&format!("{become_root}apt-get {words}"));
        apt.env("DEBIAN_FRONTEND", "noninteractive")
    };
    let mut install = apt("install --yes --no-install-recommends");
    for program in missing {
        println!("{} is missing: {}", program.name, program.reason);
        install = install.arg(program.package);
    }
    steps.run("package lists", &apt("update"))?;
    steps.run("packages", &install)
}

/// Installs a cargo subcommand if it is missing.
pub(crate) fn install_cargo_tool(steps: &mut Steps, name: &str) -> Result<(), Failure> {
    if steps.succeeds(&cargo(&format!("{name} --version"))) {
        return Ok(());
    }
    // Without optimisation: it runs for seconds here, and optimising it takes minutes.
    steps.run(&format!("install {name}"), &cargo(&format!("install --locked --debug cargo-{name}")))
}

fn missing(programs: &[Program], found: impl Fn(&str) -> bool) -> Vec<&Program> {
    programs.iter().filter(|program| !found(program.name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_is_installed() {
        let programs =
            [Program { name: "here", package: "a", reason: "" }, Program { name: "away", package: "b", reason: "" }];
        let packages: Vec<_> = missing(&programs, |name| name == "here").iter().map(|program| program.package).collect();
        assert_eq!(packages, ["b"]);
    }
}
