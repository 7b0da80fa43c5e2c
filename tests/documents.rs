//! What the documents say of this repository is so: the guide's code is the example that the suite runs on, and the map of the
//! house shows the house.

use std::fs;
use std::path::Path;

const ARCHITECTURE: &str = include_str!("../ARCHITECTURE.md");

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_pieces_of_each_guide_are_its_example_byte_for_byte() {
    let guides = [
        (include_str!("../docs/write-a-handler.md"), include_str!("../examples/own_handler.rs")),
        (include_str!("../docs/from-tower-sessions.md"), include_str!("../examples/from_tower_sessions.rs")),
    ];
    for (guide, example) in guides {
        let pieces = guide.split("```rust\n").skip(1).map(|rest| rest.split("```").next().unwrap_or_default());
        assert_eq!(pieces.collect::<Vec<_>>().join("\n"), example);
    }
}

#[test]
fn every_folder_is_on_the_map_of_the_house() {
    let map = ARCHITECTURE.split("## The house").nth(1).and_then(|rest| rest.split("```").nth(1)).unwrap();
    for entry in fs::read_dir(root()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() && !name.starts_with('.') && name != "target" {
            assert!(map.contains(&format!("\n{name}/")), "{name}/ is not on the map");
        }
    }
}

#[test]
fn every_dependency_has_its_reason() {
    let manifest = include_str!("../Cargo.toml");
    let table = ARCHITECTURE.split("## Dependencies").nth(1).unwrap();
    let list = manifest.split("[workspace.dependencies]").nth(1).and_then(|rest| rest.split("\n[").next()).unwrap();
    let own = |line: &&str| !line.contains("path = ");
    let names: Vec<_> = list.lines().filter(own).filter_map(|line| line.split_once(" = ")).map(|(name, _)| name).collect();
    assert!(!names.is_empty());
    for name in names {
        assert!(table.contains(&format!("`{name}`")), "{name} is not in the table");
    }
}
