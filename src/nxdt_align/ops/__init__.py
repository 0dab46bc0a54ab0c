"""Operations on tensors that know no model, data set or process group."""
