//! Services that a test invents at run time: manifests in a directory, taken away again afterwards.
//!
//! May touch: files of a lab's directory. Each file is written beside and renamed, as an operator's tool would.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::lab::{Lab, PROJECT};

/// Manifests of one Service in one or more directories; gone when dropped.
pub struct Service {
    files: Vec<PathBuf>,
}

impl Service {
    /// Writes a Service with these VIPs, whose `port` leads to `target` of these pods, into `directory`.
    pub fn write(
        lab: &Lab,
        directory: &Path,
        name: &str,
        vips: [IpAddr; 2],
        ports: (u16, u16),
        protocol: &str,
        pods: &[&str],
    ) -> Self {
        let (port, target) = ports;
        let [v4, v6] = vips;
        let mut text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: {PROJECT} }}\n\
             spec:\n  type: ClusterIP\n  clusterIP: {v4}\n  clusterIPs: [ {v4}, '{v6}' ]\n  ipFamilies: [ IPv4, IPv6 ]\n\
             \x20 ports: [ {{ name: p, port: {port}, protocol: {protocol}, targetPort: {target} }} ]\n"
        );
        for (family, like) in [("IPv4", v4), ("IPv6", v6)] {
            text += &format!(
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: {family}\n\
                 metadata:\n  name: {name}-{}\n  namespace: {PROJECT}\n  labels: {{ kubernetes.io/service-name: {name} }}\n\
                 ports: [ {{ name: p, port: {target}, protocol: {protocol} }} ]\nendpoints:\n",
                family.to_lowercase()
            );
            for pod in pods {
                text += &format!(
                    "- addresses: [ '{}' ]\n  conditions: {{ ready: true }}\n\
                     \x20 targetRef: {{ kind: Pod, name: {pod}, namespace: {PROJECT} }}\n",
                    lab.pod(pod).address(like)
                );
            }
        }
        let file = directory.join(format!("zz-{name}.yaml"));
        replace(&file, &text);
        Self { files: vec![file] }
    }

    /// Leaves the manifests where they are.
    pub fn keep(mut self) {
        self.files.clear();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        for file in &self.files {
            // The lab may be gone already.
            let _ = fs::remove_file(file);
        }
    }
}

/// Writes a file in one step.
pub fn replace(file: &Path, text: &str) {
    let hidden = file.with_extension("new");
    fs::write(&hidden, text).unwrap_or_else(|e| panic!("write {}: {e}", hidden.display()));
    fs::rename(&hidden, file).unwrap_or_else(|e| panic!("rename to {}: {e}", file.display()));
}

/// A copy of the project's directory as it is now.
pub fn copy_directory(lab: &Lab, name: &str) -> PathBuf {
    let to = lab.run_dir().join("directory").join(name);
    fs::create_dir_all(&to).expect("a folder");
    for entry in fs::read_dir(lab.directory(PROJECT)).expect("the directory").flatten() {
        fs::copy(entry.path(), to.join(entry.file_name())).expect("a copy");
    }
    to
}
