"""How fast a step is: against stock torch, against DeepSpeed and against the memory itself."""
