//! Tools: what a machine must have besides Rust, and how it gets there.
//!
//! Nothing here knows what a tool is used for beyond the reason it prints.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::step::{Failure, Steps, cargo, command};

/// A program that tests start, the Debian package that has it, and the crate whose tests start it.
#[derive(Debug)]
struct Program {
    name: &'static str,
    package: &'static str,
    tests_of: &'static str,
}

/// Every program that tests start. What the tests of a crate need is installed from the day on which the workspace has the
/// crate; a program that more crates need has a line under each, so that it stays when one of them goes.
const PROGRAMS: &[Program] = &[
    Program { name: "sh", package: "dash", tests_of: "xtask" },
    Program { name: "redis-server", package: "redis-server", tests_of: "conformance-tests" },
    Program { name: "postgres", package: "postgresql", tests_of: "conformance-tests" },
    // The server alone, without a service and without a database of its own.
    Program { name: "mariadbd", package: "mariadb-server-core", tests_of: "conformance-tests" },
    Program { name: "pgbouncer", package: "pgbouncer", tests_of: "conformance-tests" },
    Program { name: "memcached", package: "memcached", tests_of: "conformance-tests" },
    Program { name: "redis-server", package: "redis-server", tests_of: "session-redis" },
    Program { name: "memcached", package: "memcached", tests_of: "session-memcache" },
    Program { name: "postgres", package: "postgresql", tests_of: "session-sql" },
    Program { name: "mariadbd", package: "mariadb-server-core", tests_of: "session-sql" },
    Program { name: "redis-server", package: "redis-server", tests_of: "session-web" },
    Program { name: "postgres", package: "postgresql", tests_of: "session-web" },
    Program { name: "chromium", package: "chromium", tests_of: "sessionkit" },
    Program { name: "chromedriver", package: "chromium-driver", tests_of: "sessionkit" },
    Program { name: "chromium", package: "chromium", tests_of: "sessionctl" },
    Program { name: "chromedriver", package: "chromium-driver", tests_of: "sessionctl" },
    Program { name: "php", package: "php-cli", tests_of: "session-php" },
];

/// Installs packages and starts none of their services, which would take the ports that people know: whoever starts a service
/// in an installation asks this policy first. One that the machine has already is left as it is.
///
/// In one shell, so that the policy goes with it, and because `sudo` hands no environment down.
const INSTALL: &str = "\
export DEBIAN_FRONTEND=noninteractive
apt-get update || echo 'the package lists are not fresh; trying with those that are there' >&2
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\\nexit 101\\n' >$policy && chmod 755 $policy || exit 1
fi
apt-get install --yes --no-install-recommends -o DPkg::Lock::Timeout=300 \"$@\"";

/// Installs the packages of the programs that are missing, if any.
pub(crate) fn install_debian_packages(steps: &mut Steps, crates: &[String]) -> Result<(), Failure> {
    let missing = missing(PROGRAMS, crates, |name| find(name).is_some());
    if missing.is_empty() {
        return Ok(());
    }
    let root = std::fs::metadata("/proc/self").is_ok_and(|this| this.uid() == 0);
    let shell = command(if root || !Path::new("/usr/bin/sudo").exists() { "sh -c" } else { "sudo -n sh -c" });
    let mut install = shell.arg(INSTALL).arg("install");
    for Program { name, package, tests_of } in missing {
        println!(
            "{name} is missing: the tests of {tests_of} start it. On Debian it is in the package {package}; elsewhere, install it by hand"
        );
        install = install.arg(package);
    }
    steps.run("packages", &install)
}

/// Unpacks a memcached that is newer than the machine's, in the target directory, where the tests look for it; if there is one
/// already, it says so.
pub(crate) fn unpack_newer_memcached(steps: &mut Steps) -> Result<(), Failure> {
    let place = target_directory().join("memcached");
    steps.run("newer memcached", &command("sh xtask/newer-memcached.sh").arg(&place.to_string_lossy()))
}

/// Returns the directory that cargo builds in: this program was.
fn target_directory() -> PathBuf {
    let executable = std::env::current_exe().unwrap_or_default();
    executable.ancestors().nth(2).unwrap_or(Path::new("target")).into()
}

/// Returns where a program is.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    places().into_iter().map(|place| place.join(name)).find(|path| path.is_file())
}

/// Where programs are looked for: as the tests do it.
fn places() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian keeps servers where only root looks, and those of PostgreSQL by version.
    let mut places: Vec<_> = std::env::split_paths(&path).collect();
    places.extend(["/usr/sbin", "/usr/local/sbin", "/sbin"].map(Into::into));
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    places.extend(versions.map(|version| version.path().join("bin")));
    places
}

/// A cargo subcommand, in the version that is known to build with our Rust.
#[derive(Clone, Copy, Debug)]
pub(crate) enum CargoTool {
    Nextest,
    Deny,
    Audit,
}

impl CargoTool {
    fn name_and_version(self) -> (&'static str, &'static str) {
        match self {
            Self::Nextest => ("nextest", "0.9.143"),
            Self::Deny => ("deny", "0.20.2"),
            Self::Audit => ("audit", "0.22.2"),
        }
    }
}

/// Installs a cargo subcommand if it is missing; whichever version is there is good.
pub(crate) fn install_cargo_tool(steps: &mut Steps, tool: CargoTool) -> Result<(), Failure> {
    let (name, version) = tool.name_and_version();
    if steps.succeeds(&cargo(&format!("{name} --version"))) {
        return Ok(());
    }
    println!("cargo-{name} is missing: it is built once, which takes some minutes");
    // Neither optimised nor for a debugger: it runs for seconds here, and either takes minutes.
    let install = cargo(&format!("install --locked --debug cargo-{name}@{version}")).env("CARGO_PROFILE_DEV_DEBUG", "false");
    steps.run(&format!("install {name}"), &install)
}

/// What the tests of these crates start and nobody has found, each package once.
fn missing<'a>(programs: &'a [Program], crates: &[String], found: impl Fn(&str) -> bool) -> Vec<&'a Program> {
    let mut missing: Vec<&Program> = Vec::new();
    for program in programs {
        let needed = crates.iter().any(|name| name == program.tests_of);
        if needed && !missing.iter().any(|other| other.package == program.package) && !found(program.name) {
            missing.push(program);
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn program(name: &'static str, package: &'static str, tests_of: &'static str) -> Program {
        Program { name, package, tests_of }
    }

    #[test]
    fn only_what_is_missing_and_needed_is_installed_and_once() {
        let programs = [
            program("here", "a", "ours"),
            program("away", "b", "ours"),
            program("away", "b", "ours too"),
            program("later", "c", "not written yet"),
        ];
        let crates = ["ours too", "ours"].map(String::from);
        let packages: Vec<_> = missing(&programs, &crates, |name| name == "here").iter().map(|one| one.package).collect();
        assert_eq!(packages, ["b"]);
    }

    #[test]
    fn the_workspace_needs_what_its_own_tests_start() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let crates: Vec<_> = crate::manifest::packages(root).into_iter().map(|package| package.name).collect();
        let needed: Vec<_> = missing(PROGRAMS, &crates, |_| false).iter().map(|program| program.name).collect();
        assert!(needed.contains(&"sh") && needed.contains(&"redis-server"), "{needed:?}");
    }

    #[test]
    fn what_installs_is_shell() {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/newer-memcached.sh");
        for words in [&["-n", "-c", INSTALL][..], &["-n", script]] {
            assert!(std::process::Command::new("sh").args(words).status().unwrap().success(), "{words:?}");
        }
    }
}
