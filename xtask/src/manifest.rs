//! Manifests: which packages the workspace has and which features each of them has.
//!
//! Reads the few lines it needs as our manifests write them, one key a line, and knows nothing else of TOML.

use std::path::Path;

/// A package and the features that it can be built with, `default` left out.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) features: Vec<String>,
}

/// Returns the package in the root and every member of the workspace.
pub(crate) fn packages(root: &Path) -> Vec<Package> {
    let read = |folder: &str| {
        let path = root.join(folder).join("Cargo.toml");
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let workspace = read("");
    let members = members(&workspace);
    std::iter::once(package(&workspace)).chain(members.iter().map(|folder| package(&read(folder)))).collect()
}

fn members(text: &str) -> Vec<String> {
    let list = text.split_once("\nmembers = [").and_then(|(_, rest)| rest.split_once(']'));
    let (list, _) = list.expect("the workspace lists its members");
    list.split('"').skip(1).step_by(2).map(Into::into).collect()
}

fn package(text: &str) -> Package {
    let mut section = "";
    let (mut name, mut features) = (None, Vec::new());
    for line in text.lines() {
        match (line.strip_prefix('['), line.split_once(" = ")) {
            (Some(header), _) => section = header.trim_end_matches(']'),
            (None, Some(("name", value))) if section == "package" => name = Some(value.trim_matches('"').to_owned()),
            (None, Some((feature, _))) if section == "features" && feature != "default" && !feature.starts_with('#') => {
                features.push(feature.to_owned());
            }
            _ => {}
        }
    }
    Package { name: name.expect("a package has a name"), features }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_features_are_found() {
        let text = "[workspace]\nmembers = [\n    \"a\",\n    \"b\",\n]\n[package]\nname = \"x\"\n\n[features]\n# c = []\n\
                    default = []\nfile = [\"dep:y\"]\njson = []\n\n[dependencies]\ny = { optional = true }\n";
        assert_eq!(members(text), ["a", "b"]);
        assert_eq!(package(text), Package { name: "x".into(), features: vec!["file".into(), "json".into()] });
    }

    #[test]
    fn this_workspace_is_read_as_cargo_reads_it() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let packages = packages(root);
        let metadata = std::process::Command::new(env!("CARGO"))
            .args(["metadata", "--no-deps", "--format-version", "1", "--locked", "--offline"])
            .current_dir(root)
            .output()
            .unwrap();
        let metadata = String::from_utf8(metadata.stdout).unwrap();
        assert_eq!(packages.len(), metadata.matches(r#""manifest_path":"#).count());
        for Package { name, features } in packages {
            assert!(metadata.contains(&format!(r#""name":"{name}","version""#)), "{name}");
            for feature in features {
                assert!(metadata.contains(&format!(r#""{feature}":["#)), "{name} {feature}");
            }
        }
    }
}
