"""The kernels: ways to compute a problem. `choose` picks one; no kernel knows a layer, no word knows a kernel."""
