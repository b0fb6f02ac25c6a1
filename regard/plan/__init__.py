"""A checked call, split into the plan, a frozen record, and its tensors."""
