"""Better training without new parameters, in the spirit of EIM: a measure in each part, against plain training."""
