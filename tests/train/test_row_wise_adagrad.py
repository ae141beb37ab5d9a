"""Row-wise Adagrad against its formula, one row at a time."""

import numpy as np
import torch

from dlrm_deploy.train.row_wise_adagrad import RowWiseAdagrad


def sparse(rows, values, size):
    return torch.sparse_coo_tensor([rows], torch.tensor(values), size, check_invariants=True)


def test_rows_are_updated_once_by_the_sum_of_their_gradients():
    weight = torch.nn.Parameter(torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    optimizer = RowWiseAdagrad([weight], lr=0.1, eps=1e-3, weight_decay=0.5)
    expected, state = weight.detach().double().numpy().copy(), np.zeros(3)
    for rows, values in [([2, 0, 2], [[1.0, 1], [2, -2], [3, 0]]), ([2], [[0.5, 0.25]])]:
        weight.grad = sparse(rows, values, (3, 2))
        optimizer.step()
        for row in set(rows):
            gradient = sum(np.array(v) for r, v in zip(rows, values, strict=True) if r == row) + 0.5 * expected[row]
            state[row] += np.mean(gradient**2)
            expected[row] -= 0.1 * gradient / (np.sqrt(state[row]) + 1e-3)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(optimizer.state[0].numpy(), state, rtol=1e-6)
    assert weight[1].tolist() == [3, 4]  # untouched rows do not decay


def test_parameters_without_a_gradient_stay():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = RowWiseAdagrad([weight], lr=0.1)
    weight.grad = sparse([0], [[1.0, 1]], (2, 2))
    optimizer.zero_grad()
    optimizer.step()
    assert weight.grad is None
    assert weight.tolist() == [[1, 1], [1, 1]]
