"""A virtual machine in the mesh: its guest is built here, its job file is `vm.yaml`."""
