// GroupedPackedLinear, GroupedPackedLinearFloat and GroupedDenseLinear: linears whose rows choose their matrix.
//
// Rows are put in the order of their experts. The rows of one expert are a product of the drivers for one matrix, and the
// tasks of all products are numbered through and shared out together: a few rows with an expert each keep all threads as
// busy as many rows of one. Rows that lie next to each other (and a single one always does) are read and written where
// they are, others through scratch memory.
#include "op.h"

namespace isofold {
namespace {

// The rows of one expert: `rows` from `begin` in the order of experts.
struct Group {
  int64_t expert, begin, rows;
  bool gathered;  // they do not lie next to each other
};

struct Groups {
  RunScratch memory;
  int64_t* order = nullptr;  // rows by expert; behind them those without one
  Group* groups = nullptr;
  int64_t count = 0, placed = 0;

  // For `rows` rows and experts 0..experts-1.
  Groups(int64_t rows, int64_t experts)
      : memory(size_t(rows + experts + 1) * sizeof(int64_t) + size_t(rows < experts ? rows : experts) * sizeof(Group)) {}

  void sort(const int64_t* expert, int64_t rows, int64_t experts) {
    auto* starts = static_cast<int64_t*>(memory.data);
    order = starts + experts + 1;
    groups = reinterpret_cast<Group*>(order + rows);
    auto own = [&](int64_t r) { return expert[r] >= 0 && expert[r] < experts ? expert[r] : experts; };
    memset(starts, 0, size_t(experts + 1) * sizeof(int64_t));
    for (int64_t r = 0; r < rows; ++r) ++starts[own(r)];
    for (int64_t e = 0, at = 0; e <= experts; ++e) {
      int64_t size = starts[e];
      if (size && e < experts) groups[count++] = {e, at, size, false};
      if (e == experts) placed = at;
      starts[e] = at;
      at += size;
    }
    for (int64_t r = 0; r < rows; ++r) order[starts[own(r)]++] = r;
    for (int64_t g = 0; g < count; ++g)
      for (int64_t i = 1; i < groups[g].rows; ++i)
        groups[g].gathered |= order[groups[g].begin + i] != order[groups[g].begin] + i;
  }
};

// One operator's inputs and output, as rows of so many bytes.
struct Rows {
  const char* x;
  int64_t bytes;
  const float* pairs;  // of each row; or null
  float* y;
  int64_t n, rows;
};

// One expert's product.
template <class Call>
struct Product {
  isofold_linear linear;
  Call call;
  int64_t task;      // the number of its first one
  int64_t prepared;  // how many rows are in front of it
};

// `product(group, x, pairs, y)` makes the product of an expert on rows that lie next to each other; `prepare` and `run`
// do (product, begin, end) of its rows and tasks.
template <class Call, class Make, class Prepare, class Run>
OrtStatus* run_grouped(const Context& c, const Rows& r, const Tensor& expert, int64_t experts, double rate,
                       bool prepares, const Make& product, const Prepare& prepare, const Run& run) {
  if (r.rows == 0) return nullptr;
  Groups groups(r.rows, experts);
  if (!groups.memory.data) return out_of_memory(c.api, c.op->name, size_t(r.rows) * sizeof(int64_t));
  groups.sort(expert.as<int64_t>(), r.rows, experts);
  for (int64_t i = groups.placed; i < r.rows; ++i) memset(r.y + groups.order[i] * r.n, 0, size_t(r.n) * sizeof(float));
  if (groups.count == 0) return nullptr;
  bool gathers = false;
  for (int64_t g = 0; g < groups.count; ++g) gathers |= groups.groups[g].gathered;
  // Products, then activations, pairs and results in the order of experts, each at a multiple of 64 bytes.
  size_t products = size_t(ceil_to(int64_t(sizeof(Product<Call>)) * groups.count, 64));
  size_t rows = gathers ? size_t(ceil_to(groups.placed * r.bytes, 64)) : 0;
  size_t pairs = gathers && r.pairs ? size_t(ceil_to(groups.placed * 8, 64)) : 0;
  size_t results = gathers ? size_t(groups.placed * r.n) * sizeof(float) : 0;
  RunScratch scratch(products + rows + pairs + results);
  if (!scratch.data) return out_of_memory(c.api, c.op->name, products + rows + pairs + results);
  auto* memory = static_cast<char*>(scratch.data);
  auto* all = reinterpret_cast<Product<Call>*>(memory);
  char* x = memory + products;
  auto* pair = reinterpret_cast<float*>(x + rows);
  auto* y = reinterpret_cast<float*>(x + rows + pairs);
  int64_t tasks = 0;
  double mean = double(groups.placed) / double(groups.count);
  for (int64_t g = 0; g < groups.count; ++g) {
    const Group& group = groups.groups[g];
    int64_t first = groups.order[group.begin], at = group.begin;
    if (group.gathered)
      product(group, x + at * r.bytes, r.pairs ? pair + 2 * at : nullptr, y + at * r.n, all + g);
    else
      product(group, r.x + first * r.bytes, r.pairs ? r.pairs + 2 * first : nullptr, r.y + first * r.n, all + g);
    all[g].task = tasks;
    all[g].prepared = group.begin;
    tasks += isofold_linear_tasks(&all[g].linear, group.rows);
  }
  // f(group, begin, end) for the parts of begin..end that belong to each group, numbered by `from`.
  auto each = [&](int64_t begin, int64_t end, int64_t total, int64_t Product<Call>::*from, const auto& f) {
    for (int64_t g = 0; g < groups.count; ++g) {
      int64_t first = all[g].*from, last = g + 1 < groups.count ? all[g + 1].*from : total;
      int64_t b = begin > first ? begin : first, e = end < last ? end : last;
      if (b < e) f(g, b - first, e - first);
    }
  };
  if (gathers || prepares)
    ISOFOLD_TRY(c.parallel(groups.placed, 0.1 * double(r.bytes), [&](int64_t begin, int64_t end) {
      each(begin, end, groups.placed, &Product<Call>::prepared, [&](int64_t g, int64_t b, int64_t e) {
        const Group& group = groups.groups[g];
        for (int64_t i = group.begin + b; group.gathered && i < group.begin + e; ++i) {
          memcpy(x + i * r.bytes, r.x + groups.order[i] * r.bytes, size_t(r.bytes));
          if (r.pairs) memcpy(pair + 2 * i, r.pairs + 2 * groups.order[i], 2 * sizeof(float));
        }
        prepare(all[g], b, e);
      });
    }));
  const isofold_linear& l = all->linear;
  double read = 32.0 * double(l.kp) * l.bits / 8 / 20;  // as for one matrix (linear.cc)
  mean = mean < ISOFOLD_ROW_BLOCK ? mean : double(ISOFOLD_ROW_BLOCK);
  double work = mean * double(l.kp) * 64 / rate;
  ISOFOLD_TRY(c.parallel(tasks, read > work ? read : work, [&](int64_t begin, int64_t end) {
    each(begin, end, tasks, &Product<Call>::task, [&](int64_t g, int64_t b, int64_t e) { run(all[g], b, e); });
  }));
  if (!gathers) return nullptr;
  return c.parallel(groups.placed, 0.1 * double(r.n) * 4, [&](int64_t begin, int64_t end) {
    each(begin, end, groups.placed, &Product<Call>::prepared, [&](int64_t g, int64_t b, int64_t e) {
      const Group& group = groups.groups[g];
      for (int64_t i = group.begin + b; group.gathered && i < group.begin + e; ++i)
        memcpy(r.y + groups.order[i] * r.n, y + i * r.n, size_t(r.n) * sizeof(float));
    });
  });
}

struct GroupedKernel : KernelBase {
  isofold_linear linear;
  int64_t k;
};

OrtStatus* create_grouped(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<GroupedKernel*>(memory);
  kernel.linear = {};
  return create_integers(a, &kernel.linear, &kernel.k);
}

OrtStatus* create_grouped_dense(void* memory, const Attributes& a) {
  auto& kernel = *static_cast<GroupedKernel*>(memory);
  isofold_linear& l = kernel.linear = {};
  l.bits = 32;
  l.scale_multiplier = 1;
  ISOFOLD_TRY(a.at_least("n", 1, &l.n));
  ISOFOLD_TRY(a.at_least("k", 1, &l.kp));
  kernel.k = l.kp;
  return nullptr;
}

// Inputs by place; 0: the operator has none such.
struct GroupedInputs {
  size_t expert, weight, scale, zero, wsum, bias;
};

// Constant inputs, of which each expert has its part.
struct Experts {
  Tensor weight, scale, zero, wsum, bias;
  int64_t count;

  // The linear of one of them.
  isofold_linear of(isofold_linear l, int64_t e) const {
    auto part = [&](const Tensor& t, int64_t size) -> const void* {
      return t.present ? static_cast<const char*>(t.data) + e * (t.shape.count() / count) * size : nullptr;
    };
    l.weight = part(weight, l.bits == 32 ? 4 : 1);
    l.scale = part(scale, l.group_size ? 2 : 4);
    l.zero = static_cast<const int8_t*>(part(zero, 1));
    l.wsum = static_cast<const float*>(part(wsum, 4));
    l.bias = static_cast<const float*>(part(bias, 4));
    return l;
  }
};

Shape with_first(int64_t first, Shape shape) {
  for (int i = shape.rank++; i > 0; --i) shape.dims[i] = shape.dims[i - 1];
  shape.dims[0] = first;
  return shape;
}

OrtStatus* read_experts(const Context& c, const GroupedInputs& at, const isofold_linear& l, int64_t rows,
                        Tensor* expert, Experts* experts) {
  ISOFOLD_TRY(c.input(at.expert, expert));
  ISOFOLD_TRY(c.expect(at.expert, *expert, ORT_INT64, shape_of(rows)));
  ISOFOLD_TRY(c.input(at.weight, &experts->weight));
  ISOFOLD_TRY(c.input(at.bias, &experts->bias));
  if (experts->weight.shape.rank < 1 || experts->weight.shape[0] < 1)
    return c.bad_input(at.weight, "expected the matrices of at least one expert, got %s",
                       describe(experts->weight.type, experts->weight.shape).text);
  int64_t count = experts->count = experts->weight.shape[0];
  ISOFOLD_TRY(c.expect(at.bias, experts->bias, ORT_FLOAT, shape_of(count, l.n)));
  int64_t panels = isofold_linear_panels(&l), groups = isofold_linear_groups(&l);
  if (l.bits == 32)
    return c.expect(at.weight, experts->weight, ORT_FLOAT,
                    shape_of(count, isofold_dense_blocks(&l), l.kp, ISOFOLD_DENSE_PANEL));
  ISOFOLD_TRY(c.input(at.scale, &experts->scale));
  ISOFOLD_TRY(c.input(at.zero, &experts->zero));
  Shape packed = l.bits == 3 ? shape_of(panels, l.kp / 32, 3, 16, 4) : shape_of(panels, l.kp * l.bits / 32, 16, 4);
  Shape grouped = shape_of(count, panels, groups, 16);
  ISOFOLD_TRY(c.expect(at.weight, experts->weight, l.bits == 8 ? ORT_INT8 : ORT_UINT8, with_first(count, packed)));
  ISOFOLD_TRY(c.expect(at.scale, experts->scale, l.group_size ? ORT_FLOAT16 : ORT_FLOAT, grouped));
  ISOFOLD_TRY(c.expect(at.zero, experts->zero, ORT_INT8, grouped));
  if (!at.wsum) return nullptr;
  ISOFOLD_TRY(c.input(at.wsum, &experts->wsum));
  return c.expect(at.wsum, experts->wsum, ORT_FLOAT, shape_of(count, 16 * panels));
}

OrtStatus* compute_grouped(void* memory, Context& c) {
  const isofold_linear& l = static_cast<const GroupedKernel*>(memory)->linear;
  Tensor u, params, expert;
  Experts experts;
  ISOFOLD_TRY(c.input(0, &u));
  ISOFOLD_TRY(c.input(1, &params));
  if (u.shape.rank != 2) return c.bad_input(0, "expected two dimensions, got %s", describe(u.type, u.shape).text);
  ISOFOLD_TRY(c.expect_last(0, u, l.kp));
  int64_t m = u.shape[0];
  bool per_tensor = params.shape == shape_of(2);
  if (!per_tensor) ISOFOLD_TRY(c.expect(1, params, ORT_FLOAT, shape_of(m, 2)));
  ISOFOLD_TRY(read_experts(c, {2, 3, 4, 5, 6, 7}, l, m, &expert, &experts));
  float* y = nullptr;
  ISOFOLD_TRY(c.output(0, shape_of(m, l.n), &y));
  // Sums of activations, where there are zero points: for each product its own, in the order of its rows.
  int64_t sums = ceil_to(isofold_linear_groups(&l) * 8, 64) + 128;
  RunScratch scratch(experts.zero.present ? size_t(m * sums) : 0);
  if (experts.zero.present && m && !scratch.data) return out_of_memory(c.api, c.op->name, size_t(m * sums));
  Rows rows = {static_cast<const char*>(u.data), l.kp, per_tensor ? nullptr : params.f32(), y, l.n, m};
  auto product = [&](const Group& group, const char* x, const float* pairs, float* out,
                     Product<isofold_linear_call>* p) {
    void* own = scratch.data ? static_cast<char*>(scratch.data) + group.begin * sums : nullptr;
    p->linear = experts.of(l, group.expert);
    p->call = {reinterpret_cast<const uint8_t*>(x), per_tensor ? params.f32() : pairs, nullptr, out, group.rows,
               per_tensor, own};
  };
  return run_grouped<isofold_linear_call>(
      c, rows, expert, experts.count, 600, experts.zero.present, product,
      [](const Product<isofold_linear_call>& p, int64_t begin, int64_t end) {
        isofold_linear_prepare(kernels, isa, &p.linear, &p.call, begin, end);
      },
      [](const Product<isofold_linear_call>& p, int64_t begin, int64_t end) {
        isofold_linear_run(kernels, isa, &p.linear, &p.call, begin, end);
      });
}

// Float activations: input 0, and the others behind it.
template <class Run>
OrtStatus* compute_float(const GroupedKernel& kernel, const GroupedInputs& at, Context& c, const Run& run) {
  using Call = isofold_linear_float_call;
  const isofold_linear& l = kernel.linear;
  Tensor x, expert;
  Experts experts;
  ISOFOLD_TRY(c.input(0, &x));
  if (x.shape.rank != 2) return c.bad_input(0, "expected two dimensions, got %s", describe(x.type, x.shape).text);
  ISOFOLD_TRY(c.expect_last(0, x, kernel.k));
  int64_t m = x.shape[0];
  ISOFOLD_TRY(read_experts(c, at, l, m, &expert, &experts));
  float* y = nullptr;
  ISOFOLD_TRY(c.output(0, shape_of(m, l.n), &y));
  Rows rows = {static_cast<const char*>(x.data), kernel.k * 4, nullptr, y, l.n, m};
  auto product = [&](const Group& group, const char* from, const float*, float* out, Product<Call>* p) {
    p->linear = experts.of(l, group.expert);
    p->call = {reinterpret_cast<const float*>(from), nullptr, out, group.rows, kernel.k};
  };
  return run_grouped<Call>(c, rows, expert, experts.count, 60, false, product,
                           [](const Product<Call>&, int64_t, int64_t) {}, run);
}

OrtStatus* compute_grouped_float(void* memory, Context& c) {
  return compute_float(*static_cast<const GroupedKernel*>(memory), {1, 2, 3, 4, 0, 5}, c,
                       [](const Product<isofold_linear_float_call>& p, int64_t begin, int64_t end) {
                         isofold_linear_float_run(kernels, &p.linear, &p.call, begin, end);
                       });
}

OrtStatus* compute_grouped_dense(void* memory, Context& c) {
  return compute_float(*static_cast<const GroupedKernel*>(memory), {1, 2, 0, 0, 0, 3}, c,
                       [](const Product<isofold_linear_float_call>& p, int64_t begin, int64_t end) {
                         isofold_dense_run(kernels, &p.linear, &p.call, begin, end);
                       });
}

// What all three have in common.
void define(Op* op, const char* name, size_t expert, size_t inputs) {
  op->name = name;
  op->input_count = inputs;
  op->inputs[expert] = {"expert", ORT_INT64};
  op->inputs[inputs - 1] = {"bias", ORT_FLOAT, ORT_OPTIONAL};
  op->output_count = 1;
  op->outputs[0] = {"y", ORT_FLOAT};
  op->kernel_size = sizeof(GroupedKernel);
  op->create = create_grouped;
  op->infer = infer_linear;
}

}  // namespace

void define_grouped_packed_linear(Op* op) {
  define(op, "GroupedPackedLinear", 2, 8);
  op->inputs[0] = {"u", ORT_UINT8};
  op->inputs[1] = {"params", ORT_FLOAT};
  op->inputs[3] = {"weight", ORT_UNDEFINED};
  op->inputs[4] = {"scale", ORT_UNDEFINED};
  op->inputs[5] = {"zero", ORT_INT8, ORT_OPTIONAL};
  op->inputs[6] = {"wsum", ORT_FLOAT};
  op->compute = compute_grouped;
}

void define_grouped_packed_linear_float(Op* op) {
  define(op, "GroupedPackedLinearFloat", 1, 6);
  op->inputs[0] = {"x", ORT_FLOAT};
  op->inputs[2] = {"weight", ORT_UNDEFINED};
  op->inputs[3] = {"scale", ORT_UNDEFINED};
  op->inputs[4] = {"zero", ORT_INT8, ORT_OPTIONAL};
  op->compute = compute_grouped_float;
}

void define_grouped_dense_linear(Op* op) {
  define(op, "GroupedDenseLinear", 1, 4);
  op->inputs[0] = {"x", ORT_FLOAT};
  op->inputs[2] = {"weight", ORT_FLOAT};
  op->create = create_grouped_dense;
  op->compute = compute_grouped_dense;
}

}  // namespace isofold
