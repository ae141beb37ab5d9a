from dlrm_deploy.engines.tensorrt.layers import PlanLayer, read_layers, read_memory

LOG = [
    "Layers:\nName: an earlier attempt, LayerType: kgen, Inputs: [], Constants: [], Outputs: []",
    "Max Scratch Memory: 8208384 bytes",
    "Total Weights Memory: 2976 bytes",
    "Layers:\n"
    "Name: __mye1_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , Metadata: \n"
    "Name: __myl_Gath_1, LayerType: kgen, Inputs: [ { Name: offsets, Dimensions: [-1], Strides: [1] }, "
    "{ Name: tables_width8, Dimensions: [73,8], Strides: [8,1] }, { Name: __tmp, Dimensions: [-1] }], "
    "Constants: [ { Name: dense, Dimensions: [1] }], Outputs: [ { Name: x, Dimensions: [-1] }], Metadata: \n",
    "Adding 1 engine(s) to plan file.",
]


def test_the_last_block_of_layers_counts_with_the_plan_inputs_that_each_reads():
    layers = read_layers(LOG, {"dense", "offsets", "tables_width8"})
    assert layers == (
        PlanLayer(name="__mye1_0", type="shape_call", reads=()),
        PlanLayer(name="__myl_Gath_1", type="kgen", reads=("offsets", "tables_width8")),
    )


def test_memory_is_read_where_it_is_stated():
    assert read_memory(LOG) == {"scratch_bytes": 8208384, "weights_bytes": 2976}


def test_a_log_without_them_gives_nothing():
    assert read_layers(["Building"], {"dense"}) == ()
    assert read_memory(["Building"]) == {}
