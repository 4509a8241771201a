"""The ground: what this node is. Devices, the driver, memory, machine code."""
