//! Freezing of cgroups and saving of cgroup trees, on v1, v2 and hybrid hosts.
