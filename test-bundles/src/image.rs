//! A container image made from a bundle's root file system: an OCI image layout in a tar archive, as Podman and containerd
//! load it. One layer, no registry.

use crate::{Bundle, Outcome, Place, programs};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The image's name; nobody looks for it anywhere.
pub const NAME: &str = "localhost/ferry-test:1";

/// Writes the archive, and returns its path.
pub fn archive(place: &Place, bundle: &Bundle) -> Outcome<PathBuf> {
    let layout = place.folder("image")?;
    place.folder("image/blobs/sha256")?;
    let layer = place.path("layer.tar");
    pack(&bundle.root(""), &layer)?;
    let bytes = std::fs::read(&layer).map_err(|error| format!("{}: {error}", layer.display()))?;
    let layer = blob(&layout, "application/vnd.oci.image.layer.v1.tar", &bytes)?;
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}
    });
    let config = blob(&layout, "application/vnd.oci.image.config.v1+json", config.to_string().as_bytes())?;
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": [layer]});
    let mut manifest = blob(&layout, "application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes())?;
    manifest["annotations"] = json!({"io.containerd.image.name": NAME, "org.opencontainers.image.ref.name": NAME});
    write(&layout.join("index.json"), json!({"schemaVersion": 2, "manifests": [manifest]}).to_string().as_bytes())?;
    write(&layout.join("oci-layout"), br#"{"imageLayoutVersion": "1.0.0"}"#)?;
    let archive = place.path("image.tar");
    pack(&layout, &archive)?;
    Ok(archive)
}

/// Packs a folder's content.
fn pack(folder: &Path, archive: &Path) -> Outcome {
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(folder).arg("-cf").arg(archive).args(["--owner=0", "--group=0", "."]);
    programs::succeed(&mut tar).map(|_| ())
}

/// Writes a blob under its digest; returns its descriptor.
fn blob(layout: &Path, kind: &str, bytes: &[u8]) -> Outcome<Value> {
    let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    write(&layout.join("blobs/sha256").join(&digest), bytes)?;
    Ok(json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": bytes.len()}))
}

fn write(path: &Path, bytes: &[u8]) -> Outcome {
    std::fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}
